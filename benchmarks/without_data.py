"""Set files that were calibrated without data beside those of real samples: points lost, or R2, and dB on data of the task.

Run from the root of the repository::

    python -m benchmarks.without_data --data FOLDER --mnist FILE --airfoil FILE --airfoil-data FILE

``FOLDER`` holds ``mnist.npz``; ``--mnist`` is a checkpoint of an efficient-KAN 784-64-10, ``--airfoil`` one of a Chebyshev KAN
5-16-1 of degree 3 whose inputs are clamped, and ``--airfoil-data`` its table, ``noise`` last. Digits are trained here. Rows of
what is not given are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kancompile
from benchmarks import digit_models
from benchmarks.results_file import write_results
from examples import train_images
from examples.zoo import efficient_kan
from kancompile.ir import joined
from kancompile.progress import quiet
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.error_measures import ErrorMeasure
from kancompile.validation.task_metrics import TaskMetric

RECIPES = {
    "8 bits": {},
    "4 bits, gptq": {"weight_bits": 4, "method": "gptq"},
}
SAMPLES = 1000


@dataclass(frozen=True)
class Task:
    """A trained model with its data.

    Attributes:
        name: of the row.
        model: in float.
        train, test: inputs ``[n, features]``.
        targets: of the test inputs.
    """

    name: str
    model: nn.Module
    train: Tensor
    test: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Row:
    """One compilation, measured in ONNX Runtime; ``metric`` is accuracy in percent, or R2."""

    network: str
    recipe: str
    calibration: str
    metric: str
    before: float
    after: float
    sqnr_db: float
    bytes: int


class ClampedChebyshev(nn.Module):
    """Layers ``y[o] = sum of C[i, o, d] T_d(clamp(x[i], -1, 1))``."""

    def __init__(self, coefficients: list[Tensor]) -> None:
        super().__init__()
        self.coefficients = nn.ParameterList(coefficients)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, n_in]`` to ``[b, n_out]``."""
        for own in self.coefficients:
            x = x.clamp(-1, 1)
            functions = [torch.ones_like(x), x]
            while len(functions) < own.shape[2]:
                functions.append(2 * x * functions[-1] - functions[-2])
            x = torch.einsum("bid,iod->bo", torch.stack(functions[: own.shape[2]], dim=-1), own)
        return x


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Yield what there is."""
    digits = digit_models.load((64,))
    small = digit_models.build_seeded(lambda: efficient_kan.build((64, 64, 10)))
    digit_models.train(small, digits, epochs=8)
    yield Task("efficient-KAN 64-64-10, digits", small, digits.x_train, digits.x_test, digits.y_test)
    if arguments.mnist and arguments.data:
        model = efficient_kan.build((784, 64, 10))
        model.load_state_dict(_arrays(arguments.mnist))
        train, _ = train_images.load_split(arguments.data / "mnist.npz", "train")
        test, labels = train_images.load_split(arguments.data / "mnist.npz", "test")
        yield Task("efficient-KAN 784-64-10, MNIST", model, train, test, labels)
    if arguments.airfoil and arguments.airfoil_data:
        table = torch.from_numpy(np.genfromtxt(arguments.airfoil_data, delimiter=",", skip_header=1)).float()
        table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
        x, y = table[:, :-1], table[:, -1:]
        y = (y - y.mean()) / y.std()
        state = _arrays(arguments.airfoil)
        model = ClampedChebyshev([state[f"layers.{number}.cheby_coeffs"] for number in range(2)])
        yield Task("Chebyshev KAN 5-16-1, airfoil noise", model, x[:1000], x, y)


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def measure(task: Task, recipe: str, calibration: str) -> Row:
    """Compile with real samples or without, and evaluate the file on the data of the task."""
    picked = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    samples = task.train[picked] if calibration == "data" else None
    keys: dict[str, Any] = {"lookup": "each", "goal_sqnr": None, **RECIPES[recipe]}
    with quiet():
        compiled = kancompile.compile(task.model.eval(), samples, recipe=keys)
    runtime = RuntimeModel(compiled.model_bytes)
    error, before, after = ErrorMeasure(), TaskMetric(), TaskMetric()
    for x, y in zip(task.test.split(250), task.targets.split(250), strict=True):
        with torch.no_grad():
            expected = task.model(x)
        found = joined(runtime(x))
        error.add(expected, found, task.name)
        before.add(y, expected, task.name)
        after.add(y, found, task.name)
    ((metric, first),) = [(k, v) for k, v in before.values().items() if k in ("accuracy", "r2")]
    size = len(compiled.model_bytes)
    return Row(task.name, recipe, calibration, metric, first, after.values()[metric], error.sqnr_db, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz")
    parser.add_argument("--mnist", type=Path, help=".npz of its efficient-KAN")
    parser.add_argument("--airfoil", type=Path, help=".npz of the Chebyshev KAN")
    parser.add_argument("--airfoil-data", type=Path, help=".csv of its data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/without_data.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| network | recipe | calibration | float | compiled | dB | bytes |\n|---|---|---|---|---|---|---|")
    for task in tasks(arguments):
        for recipe in RECIPES:
            for calibration in ("data", "none"):
                row = measure(task, recipe, calibration)
                rows.append(row)
                figures = f"{row.before:.4g} | {row.after:.4g} | {row.sqnr_db:.1f} | {row.bytes:,}"
                print(f"| {row.network} | {recipe} | {calibration} | {figures} |", flush=True)
                write_results(arguments.out, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
