"""Tabulate what rounding methods and bit widths cost in accuracy, over several seeds.

Run from the root of the repository, with weights written by the training scripts of ``examples``::

    python -m benchmarks.accuracy --data FOLDER --checkpoints FOLDER --models mnist_efficient_kan fashion_fast_kan \
        --methods uniform gptq adaround --bits 8 4 3 2 --seeds 0 1 2

A seed chooses the calibration samples and the random numbers of the method. Rows that the result file already has are
not measured again. For ``hawq-v2`` bits are an average over all weights and may be a fraction, such as 2.03.
With ``--table-bits 8 4`` entries of tables have 8 and 4 bits. With ``--drift off on`` rows with and without weights that make up
for drift stand below each other.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kancompile
from benchmarks.measured_models import MNIST_WIDTHS
from benchmarks.results_file import read_results, write_results
from examples import train_cifar10, train_images
from examples.zoo import efficient_kan, fast_kan, kagn_conv
from kancompile.ir import joined
from kancompile.progress import quiet, say
from kancompile.recipe import DRIFTS, METHODS
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.error_measures import ErrorMeasure
from kancompile.validation.task_metrics import TaskMetric

_BATCH = 250
Split = Callable[[Path, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainedModel:
    """How to build a trained model, and its data.

    Attributes:
        build: makes the float model without its weights; takes a ``seed``.
        data: name of the ``.npz`` file.
        load_split: reads images and labels of ``"train"`` or ``"test"``.
    """

    build: Callable[..., nn.Module]
    data: str
    load_split: Split


def _perceptron(build: Callable[..., nn.Module], data: str) -> TrainedModel:
    return TrainedModel(partial(build, MNIST_WIDTHS), data, train_images.load_split)


MODELS = {
    "mnist_efficient_kan": _perceptron(efficient_kan.build, "mnist.npz"),
    "mnist_fast_kan": _perceptron(fast_kan.build, "mnist.npz"),
    "fashion_efficient_kan": _perceptron(efficient_kan.build, "fashion_mnist.npz"),
    "fashion_fast_kan": _perceptron(fast_kan.build, "fashion_mnist.npz"),
    "cifar10_kagn": TrainedModel(kagn_conv.build, "cifar10.npz", train_cifar10.load_split),
    "cifar100_kagn": TrainedModel(partial(kagn_conv.build, n_classes=100), "cifar100.npz", train_cifar10.load_split),
}


@dataclass(frozen=True)
class Row:
    """One compilation, measured in ONNX Runtime on all test images.

    Attributes:
        model, method, bits, seed, samples, levels, group_size: what was compiled, with how many calibration samples, table
            rows (``None``: chosen by error) and inputs to a scale (``None``: all); together with ``drift``, whether weights
            make up for it, and ``table_bits`` they identify the row.
        float_accuracy, accuracy, drop: percent, and points lost.
        sqnr_db: of the logits, against float PyTorch.
        bytes: of the file.
        seconds: of the compilation, capture and export included.
    """

    model: str
    method: str
    bits: float
    seed: int
    samples: int
    float_accuracy: float
    accuracy: float
    drop: float
    sqnr_db: float
    bytes: int
    seconds: float
    levels: int | None = None
    group_size: int | None = None
    drift: str = "off"
    table_bits: int = 8


class Measured:
    """A trained model with its data, loaded, and its float outputs, computed once."""

    def __init__(self, name: str, data: Path, checkpoints: Path) -> None:
        trained = MODELS[name]
        checkpoint, images = checkpoints / f"{name}.safetensors", data / trained.data
        for path in (checkpoint, images):
            if not path.is_file():
                raise SystemExit(f"{path}: no such file; {name} needs it")
        self.name = name
        self.model = trained.build()
        self.model.load_state_dict(load_file(checkpoint))
        self.model.eval()
        self.train, _ = trained.load_split(images, "train")
        self.test, self.labels = trained.load_split(images, "test")
        with torch.no_grad():
            self.float_outputs = [self.model(part) for part in self.test.split(_BATCH)]
        self.float_accuracy = self.accuracy(self.float_outputs)

    def measure(
        self,
        method: str,
        bits: float,
        seed: int,
        samples: int,
        levels: int | None = None,
        group_size: int | None = None,
        drift: str = "off",
        table_bits: int = 8,
    ) -> Row:
        """Compile with one method and evaluate the file on all test images."""
        # what a method does to the accuracy is measured, not what the error gate and joint look-ups make of it
        recipe: dict[str, Any] = {"method": method, "levels": levels, "drift": drift, "table_bits": table_bits}
        recipe |= {"goal_sqnr": None, "lookup": "each"}
        recipe |= {"bits_average": bits} if method == "hawq-v2" else {"weight_bits": int(bits)}
        if group_size is not None:
            recipe |= {"granularity": "group", "group_size": group_size}
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[:samples]
        start = time.perf_counter()
        with quiet():
            compiled = kancompile.compile(self.model, self.train[chosen], recipe=recipe, seed=seed)
        seconds = time.perf_counter() - start
        runtime = RuntimeModel(compiled.model_bytes)
        outputs = [joined(runtime(part)) for part in self.test.split(_BATCH)]
        error = ErrorMeasure()
        for expected, output in zip(self.float_outputs, outputs, strict=True):
            error.add(expected, output, self.name)
        accuracy = self.accuracy(outputs)
        return Row(
            self.name,
            method,
            bits,
            seed,
            samples,
            self.float_accuracy,
            accuracy,
            self.float_accuracy - accuracy,
            error.sqnr_db,
            len(compiled.model_bytes),
            seconds,
            levels,
            group_size,
            drift,
            table_bits,
        )

    def parts(self) -> Iterator[Tensor]:
        """Yield the test images in batches."""
        yield from self.test.split(_BATCH)

    def accuracy(self, outputs: Sequence[Tensor]) -> float:
        """Measure the accuracy of outputs for :meth:`parts`, in percent."""
        task = TaskMetric()
        for labels, output in zip(self.labels.split(_BATCH), outputs, strict=True):
            task.add(labels, output, self.name)
        return task.values()["accuracy"]


def missing_rows(arguments: argparse.Namespace, rows: Sequence[Row]) -> Iterator[tuple[str, str, float, int, str, int]]:
    """Yield what is asked for and not yet measured, with as many samples and levels, seed by seed."""
    done = {
        (row.model, row.method, row.bits, row.seed, row.drift, row.table_bits)
        for row in rows
        if _has_settings(row, arguments)
    }
    for model in arguments.models:
        for seed in arguments.seeds:
            for bits in arguments.bits:
                for choice in itertools.product(arguments.methods, arguments.drift, arguments.table_bits):
                    method, drift, table_bits = choice
                    if (model, method, bits, seed, drift, table_bits) not in done:
                        yield model, method, bits, seed, drift, table_bits


def summary_table(rows: Sequence[Row]) -> str:
    """Print mean and standard deviation over the seeds for people."""
    cells: dict[tuple[str, float, str, str, int], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.model, row.bits, row.method, row.drift, row.table_bits), []).append(row)
    head = [
        "model",
        "bits",
        "method",
        "drift",
        "table bits",
        "seeds",
        "float",
        "accuracy",
        "drop",
        "SQNR dB",
        "bytes",
        "seconds",
    ]
    lines = [head]
    for (model, bits, method, drift, table_bits), found in sorted(
        cells.items(), key=lambda cell: (cell[0][0], -cell[0][1], *cell[0][2:])
    ):
        spreads = [_spread([getattr(row, key) for row in found]) for key in ("accuracy", "drop", "sqnr_db")]
        size = statistics.mean(row.bytes for row in found)
        seconds = statistics.mean(row.seconds for row in found)
        float_accuracy = f"{found[0].float_accuracy:.2f}"
        counts = [f"{bits:g}", method, drift, str(table_bits), str(len(found)), float_accuracy]
        lines.append([model, *counts, *spreads, f"{size:,.0f}", f"{seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} +- {statistics.stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with mnist.npz and the like")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with MODEL.safetensors")
    names = [name for name in MODELS if not name.endswith("kagn")]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=names, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: %(default)s")
    parser.add_argument("--levels", type=int, help="rows of every table (default: chosen by error)")
    parser.add_argument("--group-size", type=int, help="inputs that share a weight scale (default: all)")
    parser.add_argument("--bits", type=float, nargs="+", default=[8, 4, 3, 2], help="default: %(default)s")
    parser.add_argument(
        "--drift",
        nargs="+",
        choices=DRIFTS,
        default=["auto"],
        help="whether weights make up for it (default: %(default)s)",
    )
    parser.add_argument(
        "--table-bits", type=int, nargs="+", default=[8], help="of the entries of tables (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=1000, help="calibration samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/accuracy.json"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = [Row(**row) for row in read_results(arguments.out)] if arguments.out.is_file() else []
    measured: Measured | None = None
    for name, method, bits, seed, drift, table_bits in list(missing_rows(arguments, rows)):
        if measured is None or measured.name != name:
            measured = Measured(name, folder_with(arguments.data, MODELS[name].data), arguments.checkpoints)
        settings = arguments.samples, arguments.levels, arguments.group_size
        row = measured.measure(method, bits, seed, *settings, drift, table_bits)
        say(
            f"{name} {method} {bits:g} bits, drift {drift}, tables of {table_bits} bits, "
            f"seed {seed}: {row.accuracy:.2f} % (-{row.drop:.2f}), "
            f"{row.sqnr_db:.2f} dB, {row.bytes:,} bytes, {row.seconds:.1f} s"
        )
        rows.append(row)
        write_results(arguments.out, [asdict(row) for row in rows])
    wanted = [row for row in rows if _is_wanted(row, arguments)]
    print(summary_table(wanted))


def folder_with(folders: Sequence[Path], file: str) -> Path:
    """Find the folder that has a file.

    Raises:
        SystemExit: none has.
    """
    for folder in folders:
        if (folder / file).is_file():
            return folder
    raise SystemExit(f"{file}: found in none of {[str(folder) for folder in folders]!r}")


def _is_wanted(row: Row, arguments: argparse.Namespace) -> bool:
    return (
        row.model in arguments.models
        and row.method in arguments.methods
        and row.bits in arguments.bits
        and row.seed in arguments.seeds
        and row.drift in arguments.drift
        and row.table_bits in arguments.table_bits
        and _has_settings(row, arguments)
    )


def _has_settings(row: Row, arguments: argparse.Namespace) -> bool:
    return (row.samples, row.levels, row.group_size) == (arguments.samples, arguments.levels, arguments.group_size)


if __name__ == "__main__":
    main()
