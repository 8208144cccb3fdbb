"""Measure what one training for several widths of weights costs against a training of each.

Run from the root of the repository, with weights written by ``examples.train_mnist``::

    python -m benchmarks.elastic --data FOLDER --checkpoints FOLDER --widths 8 4 3 2 --levels 16

All trainings begin at the same compiled models, on the same samples, by the loop of ``examples.qat_mnist``. Accuracy is that
of the files in ONNX Runtime on all test images. ``elastic`` draws a width at each step; in ``progressive`` the next narrower one
joins after every eighth of the steps; ``each`` is a training for every width by itself, and ``compiled`` none at all. Rows that
the result file already has are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import kancompile
from benchmarks.accuracy import Measured
from benchmarks.results_file import read_results, write_results
from examples.qat_mnist import HELD_OUT, train
from examples.train_images import load_split
from kancompile import qat
from kancompile.ir import joined
from kancompile.progress import quiet, say
from kancompile.runtimes import RuntimeModel

_BATCH = 128
MODELS = ("mnist_efficient_kan", "mnist_fast_kan")
WAYS = ("compiled", "each", "elastic", "progressive")
Compiled = dict[int, kancompile.CompiledModel]


@dataclass(frozen=True)
class Row:
    """One width after one training.

    Attributes:
        model, levels, seed, way, bits: what was trained, with how many rows to a table, and how.
        epochs, rate: of the training; those of ``elastic`` and ``progressive`` serve all widths.
        index: method for ranges, ``None``: calibrated ones stay.
        accuracy, lost: percent, and points against float.
        differing: of all outputs, between module and ONNX Runtime.
        bytes: of the file.
    """

    model: str
    levels: int
    seed: int
    way: str
    bits: int
    epochs: int
    rate: float
    index: str | None
    accuracy: float
    lost: float
    differing: int
    bytes: int


def compiled_models(measured: Measured, widths: Sequence[int], levels: int, seed: int) -> Compiled:
    """Compile at every width, on equal samples."""
    chosen = torch.randperm(len(measured.train), generator=torch.Generator().manual_seed(seed))[:1000]
    recipe = {"levels": levels, "lookup": "each", "goal_sqnr": None}
    found = {}
    for bits in widths:
        say(f"compiling at {bits} bits ...")
        with quiet():
            found[bits] = kancompile.compile(
                measured.model, measured.train[chosen], recipe=recipe | {"weight_bits": bits}, seed=seed
            )
    return found


def trained(
    measured: Measured, labels: Tensor, compiled: Compiled, way: str, arguments: argparse.Namespace, seed: int
) -> dict[int, tuple[qat.TrainedModel, int]]:
    """Train by one way; returns the module of every width and the epochs of its training."""
    training = qat.Training(index=arguments.index)
    kept = qat.Training(index=None, tables=False)  # weights of 8 bits must fit the tables that they have
    fresh = {bits: qat.prepare_compiled(one, kept if bits == 8 else training) for bits, one in compiled.items()}
    given = (measured.model, measured.train, labels)
    if way == "compiled":
        return {bits: (module, 0) for bits, module in fresh.items()}
    if way == "each":
        for bits, module in fresh.items():
            say(f"training of {bits} bits")
            train(module, *given, arguments.epochs, _BATCH, arguments.rate, seed)
        return {bits: (module, arguments.epochs) for bits, module in fresh.items()}
    steps = arguments.elastic_epochs * -(-(len(measured.train) - HELD_OUT) // _BATCH)
    joins_after = 0 if way == "elastic" else steps // 8
    elastic = qat.ElasticModel(fresh, joins_after=joins_after, seed=seed)
    say(f"{way} training")
    train(elastic, *given, arguments.elastic_epochs, _BATCH, arguments.rate, seed)
    return {bits: (module, arguments.elastic_epochs) for bits, module in elastic.modules_by_bits().items()}


def measure(measured: Measured, module: qat.TrainedModel) -> tuple[float, int, int]:
    """Give accuracy in ONNX Runtime, outputs that differ from the module, and bytes of the file."""
    written = qat.convert(module)
    runtime, outputs, differing = RuntimeModel(written.model_bytes), [], 0
    with torch.no_grad():
        for part in measured.parts():
            outputs.append(joined(runtime(part)))
            differing += int((outputs[-1] != module(part)).sum())
    return measured.accuracy(outputs), differing, len(written.model_bytes)


def table(rows: Sequence[Row]) -> str:
    """Print points lost, a line for each way and a column for each width."""
    widths = sorted({row.bits for row in rows}, reverse=True)
    lines = [["model", "rows", "seed", "way", "epochs", *(f"W{bits} lost" for bits in widths), "differing"]]
    keys = dict.fromkeys((row.model, row.levels, row.seed, row.way, row.epochs, row.rate) for row in rows)
    for key in keys:
        of = {row.bits: row for row in rows if (row.model, row.levels, row.seed, row.way, row.epochs, row.rate) == key}
        cells = [f"{of[bits].lost:.2f}" if bits in of else "" for bits in widths]
        differing = str(sum(row.differing for row in of.values()))
        lines.append([key[0], *map(str, key[1:5]), *cells, differing])
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, sizes, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with MODEL.safetensors")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 4, 3, 2], help="default: %(default)s")
    parser.add_argument("--levels", type=int, default=16, help="rows of a table (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--index", help="method for the row index (default: none)")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="of the training of a width (default: %(default)s)")
    parser.add_argument("--elastic-epochs", type=int, default=6, help="of a training of all (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/elastic.json"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = [Row(**row) for row in read_results(arguments.out)] if arguments.out.is_file() else []
    measured = Measured(arguments.model, arguments.data, arguments.checkpoints)
    _, labels = load_split(arguments.data / "mnist.npz", "train")
    for seed in arguments.seeds:
        compiled: Compiled = {}
        for way in arguments.ways:
            key = (arguments.model, arguments.levels, seed, way, arguments.rate, arguments.index)
            if any(key == (one.model, one.levels, one.seed, one.way, one.rate, one.index) for one in rows):
                continue
            compiled = compiled or compiled_models(measured, arguments.widths, arguments.levels, seed)
            for bits, (module, epochs) in trained(measured, labels, compiled, way, arguments, seed).items():
                accuracy, differing, size = measure(measured, module)
                rows.append(
                    Row(
                        *(arguments.model, arguments.levels, seed, way, bits, epochs, arguments.rate, arguments.index),
                        *(accuracy, measured.float_accuracy - accuracy, differing, size),
                    )
                )
            say(table(rows))
            write_results(arguments.out, [asdict(row) for row in rows])
    print(table(rows))


if __name__ == "__main__":
    main()
