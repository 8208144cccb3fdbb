"""Networks of the size that others published for lookup tables, trained anew: the emitted file beside their accuracy.

Run from the root of the repository; ``dry_bean.npz`` holds ``x`` ``[13611, 16]`` and ``y``, ``mnist.npz`` the images::

    python -m benchmarks.board.rivals --data FOLDER                # networks of KANELE's widths, grids and splits
    python -m benchmarks.board.rivals --data FOLDER --published FOLDER

``--published`` is a folder with what KANELE (FPGA 2026) published of its networks: ``NAME.pt`` and ``NAME.json`` for ``moons``,
``wine`` and ``dry_bean``, renamed. Its integer truth tables are computed again from the checkpoint's weights and learned ranges,
and compared entry by entry; then the integer network is compiled, and its file compared output by output.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from benchmarks.board.rival_rows import STORED
from benchmarks.board.truth_tables import TruthTables
from benchmarks.results_file import read_results, write_results
from examples.train_images import load_split
from examples.zoo import efficient_kan
from kancompile import qat
from kancompile.ir import joined
from kancompile.progress import quiet, say
from kancompile.runtimes import RuntimeModel
from kancompile.validation.paired_decisions import PairedDecisions

_HELD_OUT = 10  # every tenth training sample chooses the epoch
_BATCH = 64
_WHOLE = 1e-3  # so far apart are integers that a float32 scale is between


@dataclass(frozen=True)
class Rival:
    """A published row.

    Attributes:
        name: of the data.
        widths, grid_size: of the network.
        bits: of its tables' rows, by layer, and of its outputs.
        published: accuracy in percent.
        test_share, seed: how the samples are divided, as its authors did.
        epochs: of training.
    """

    name: str
    widths: tuple[int, ...]
    grid_size: int
    bits: tuple[int, ...]
    published: float
    test_share: float
    seed: int
    epochs: int


RIVALS = (
    Rival("moons", (2, 2, 1), 6, (6, 5, 8), 97.41, 0.2, 420, 60),
    Rival("wine", (13, 4, 3), 6, (6, 7, 8), 98.15, 0.3, 40, 100),
    Rival("dry_bean", (16, 2, 7), 6, (6, 6, 8), 92.05, 0.2, 42, 60),
    Rival("mnist", (784, 62, 10), 30, (1, 6, 6), 96.25, 0.0, 0, 6),
)


@dataclass(frozen=True)
class Samples:
    """Standardized samples ``[n, n_in]`` and classes ``[n]``, for training and for the test."""

    x: Tensor
    y: Tensor
    test: Tensor
    labels: Tensor


def samples_of(rival: Rival, data: Path) -> Samples:
    """Divide and standardize the samples as the rival's authors did.

    Raises:
        SystemExit: a file is missing.
    """
    from sklearn.datasets import load_wine, make_moons
    from sklearn.model_selection import train_test_split

    if rival.name == "mnist":
        return Samples(*load_split(_existing(data / "mnist.npz"), "train"), *load_split(data / "mnist.npz", "test"))
    if rival.name == "moons":
        x, y = make_moons(n_samples=10000, noise=0.2, random_state=rival.seed)
    elif rival.name == "wine":
        x, y = load_wine(return_X_y=True)
    else:
        with np.load(_existing(data / "dry_bean.npz"), allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    x, test, y, labels = train_test_split(x, y, test_size=rival.test_share, random_state=rival.seed, stratify=y)
    mean, spread = x.mean(0), x.std(0)
    x, test = (torch.from_numpy((part - mean) / spread).float() for part in (x, test))
    return Samples(x, torch.from_numpy(y).long(), test, torch.from_numpy(labels).long())


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise SystemExit(f"{file}: no such file")
    return file


def float_model(rival: Rival) -> nn.Module:
    """Build an efficient-KAN of the rival's widths and grid behind a normalization of its inputs."""
    low, high = (-1.0, 1.0) if rival.name == "mnist" else (-4.0, 4.0)
    kan = efficient_kan.build(rival.widths, rival.grid_size, grid_range=(low, high), seed=0)
    return kan if rival.name == "mnist" else nn.Sequential(nn.BatchNorm1d(rival.widths[0]), kan)


def fit(module: nn.Module, samples: Samples, epochs: int, rate: float, teacher: nn.Module | None = None) -> None:
    """Train in place with Adam; the epoch of least loss on held-out samples stays, the test's are not looked at."""
    held = torch.arange(len(samples.x)) % _HELD_OUT == 0
    x, y = samples.x[~held], samples.y[~held]
    groups = qat.parameter_groups(module, rate) if isinstance(module, qat.TrainedModel) else module.parameters()
    optimizer = torch.optim.Adam(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // _BATCH))

    def loss(part: Tensor, labels: Tensor) -> Tensor:
        logits = _logits(module(part))
        lost = functional.cross_entropy(logits, labels)
        if teacher is None:
            return lost
        with torch.no_grad():
            taught = _logits(teacher(part))
        return (lost + qat.distillation_loss(logits, taught, temperature=2.0)) / 2

    def held_out() -> float:
        module.eval()
        with torch.no_grad():
            return float(functional.cross_entropy(_logits(module(samples.x[held])), samples.y[held]))

    best = qat.BestState(module, held_out())
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        module.train()
        for batch in torch.randperm(len(x), generator=generator).split(_BATCH):
            if len(batch) > 1:  # of which a normalization can take the variance
                optimizer.zero_grad()
                loss(x[batch], y[batch]).backward()
                optimizer.step()
            schedule.step()
        best.offer(held_out())
    best.restore()
    module.eval()


def _logits(outputs: Tensor) -> Tensor:
    """Give two classes logits of their own where the network has one output."""
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def measure(rival: Rival, data: Path) -> list[dict[str, Any]]:
    """Train a network, and measure files of it: by default, with the rival's rows, and trained on with few bits."""
    samples, model = samples_of(rival, data), float_model(rival)
    fit(model, samples, rival.epochs, rate=1e-3 if rival.name == "mnist" else 1e-2)
    levels = 1 << max(rival.bits[:-1])
    each = {"levels": levels, "lookup": "each", "goal_sqnr": None}
    rows = []
    for title, recipe, epochs in (
        ("8 bits, default", {}, 0),
        (f"8 bits, {levels} rows", each, 0),
        (f"4 bits, {levels} rows", each | {"weight_bits": 4}, 0),
        (f"4 bits, {levels} rows, trained on", each | {"weight_bits": 4}, min(rival.epochs, 20)),
    ):
        with quiet():
            compiled = kancompile.compile(model, samples.x[:1000], recipe=recipe)
            if epochs:
                module = qat.prepare_compiled(compiled, qat.Training("lsq", "lsq+"))
        if epochs:
            fit(module, samples, epochs, rate=0.01, teacher=model)
            compiled = qat.convert(module)
        rows.append({"rival": rival.name, "published": rival.published, "file": title} | _row(model, compiled, samples))
        say(
            f"{rival.name}, {title}: {rows[-1]['accuracy']:.2f} % (published {rival.published}), {rows[-1]['bytes']:,} bytes"
        )
    return rows


def _row(model: nn.Module, compiled: kancompile.CompiledModel, samples: Samples) -> dict[str, Any]:
    runtime = RuntimeModel(compiled.model_bytes)
    with torch.no_grad():
        outputs, simulated, reference = (
            joined(runtime(samples.test)),
            compiled.program(samples.test),
            model(samples.test),
        )
    right, float_right = (_logits(found).argmax(1) == samples.labels for found in (outputs, reference))
    paired = PairedDecisions.of(float_right, right)
    return {
        "samples": len(right),
        "float_accuracy": 100 * float(float_right.double().mean()),
        "accuracy": 100 * float(right.double().mean()),
        "interval": list(paired.accuracy_interval),
        "bytes": len(compiled.model_bytes),
        "differing": int((outputs != simulated).sum()),
    }


def compare_published(rival: Rival, data: Path, folder: Path) -> dict[str, Any]:
    """Compute published truth tables again, and compile the integer network that they are."""
    tables = TruthTables.read(folder / f"{rival.name}.pt", folder / f"{rival.name}.json", rival.bits)
    samples = samples_of(rival, data)
    entries, differing = tables.compare()
    network = tables.network()
    with torch.no_grad():
        expected = network(samples.test)
    found: dict[str, Any] = {
        "rival": rival.name,
        "published": rival.published,
        "entries": entries,
        "differing_entries": differing,
        "accuracy": _accuracy(expected, samples.labels),
        "files": {},
    }
    for precision in ("float", "int8"):
        with quiet():
            compiled = kancompile.compile(network, samples.x[:1000], recipe={"precision": precision})
        outputs = joined(RuntimeModel(compiled.model_bytes)(samples.test))
        found["files"][precision] = {
            "bytes": len(compiled.model_bytes),
            "differing_outputs": int(((outputs - expected).abs() > _WHOLE).sum()),
            "outputs": outputs.numel(),
            "accuracy": _accuracy(outputs, samples.labels),
        }
    say(f"{rival.name}: {differing} of {entries} published entries differ; files {found['files']}")
    return found


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return 100 * float((_logits(outputs).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with dry_bean.npz and mnist.npz")
    parser.add_argument("--published", type=Path, help="folder with NAME.pt and NAME.json")
    names = [rival.name for rival in RIVALS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--out", type=Path, default=STORED, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = read_results(arguments.out) if arguments.out.is_file() else {"trained": [], "published": []}
    for rival in RIVALS:
        if rival.name not in arguments.only:
            continue
        if arguments.published is None:
            key, found = "trained", measure(rival, arguments.data)
        elif rival.name == "mnist":
            continue  # whose inputs are of one bit, and whose checkpoint holds masks of another form
        else:
            key, found = "published", [compare_published(rival, arguments.data, arguments.published)]
        results[key] = [row for row in results[key] if row["rival"] != rival.name] + found
        write_results(arguments.out, results)


if __name__ == "__main__":
    main()
