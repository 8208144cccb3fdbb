"""Measure what quantization-aware training gains over compiling alone, what a step of it costs, and that bits agree.

Run from the root of the repository, with weights written by ``examples.train_mnist``::

    python -m benchmarks.qat --data FOLDER --checkpoints FOLDER --bits 4/4 2/4 2/2 --seeds 0

``2/4`` are weights of 2 bits and tables of 16 rows. A seed chooses the calibration samples and the order of training. Accuracy is
that of the file in ONNX Runtime on all test images. Steps of the float model, on the cross-entropy by Adam, are timed in turns
with those of the module. Rows that the result file already has are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from benchmarks.accuracy import Measured
from benchmarks.results_file import read_results, write_results
from examples.qat_mnist import train
from examples.train_images import load_split
from kancompile import qat
from kancompile.ir import joined
from kancompile.progress import quiet, say
from kancompile.runtimes import RuntimeModel

_BATCH = 128
_TIMED_STEPS, _ROUNDS = 8, 5
MODELS = ("mnist_efficient_kan", "mnist_fast_kan")


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        model, weight_bits, index_bits, weights, index, tables, seed, epochs, rate: what was trained, and how.
        float_accuracy, compiled_accuracy, trained_accuracy: percent.
        float_trained: accuracy of the float model after as many epochs of the same loop, at a rate of 1e-3.
        lost_compiled, lost_trained: points.
        differing_module, differing: outputs of all test images that differ between module and simulation, and between simulation
            and ONNX Runtime; norms and other float operators may differ in the last bit there.
        differing_compiled: the latter of the file before training.
        step_ratio: time of a step over that of a step of the float model, median of rounds.
        bytes: of the file.
    """

    model: str
    weight_bits: int
    index_bits: int
    weights: str
    index: str | None
    tables: bool
    seed: int
    epochs: int
    rate: float
    float_accuracy: float
    float_trained: float
    compiled_accuracy: float
    trained_accuracy: float
    lost_compiled: float
    lost_trained: float
    differing_module: int
    differing: int
    differing_compiled: int
    step_ratio: float
    bytes: int


def step_ratio(module: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Time steps of training of both models on equal batches, in turns; nothing stays changed but the modules' state."""

    def steps(network: nn.Module) -> Callable[[], float]:
        optimizer = torch.optim.Adam([value for value in network.parameters() if value.requires_grad], lr=0.0)
        network.train()

        def run() -> float:
            start = time.perf_counter()
            for part, labels in zip(x.split(_BATCH)[:_TIMED_STEPS], y.split(_BATCH), strict=False):
                optimizer.zero_grad()
                functional.cross_entropy(network(part), labels).backward()
                optimizer.step()
            return time.perf_counter() - start

        return run

    ours, theirs = steps(module), steps(model)
    ours(), theirs()
    return statistics.median(ours() / theirs() for _ in range(_ROUNDS))


def float_trained(measured: Measured, labels: Tensor, seed: int, epochs: int) -> float:
    """Train a copy of the float model on in the same loop, and measure its accuracy: what training alone gains."""
    further = copy.deepcopy(measured.model)
    train(further, measured.model, measured.train, labels, epochs, _BATCH, rate=1e-3, seed=seed)
    with torch.no_grad():
        return measured.accuracy([further(part) for part in measured.parts()])


def measure(
    measured: Measured,
    labels: Tensor,
    bits: tuple[int, int],
    training: qat.Training,
    seed: int,
    epochs: int,
    rate: float,
    control: float,
) -> Row:
    """Compile, train, convert and compare on all test images."""
    weight_bits, index_bits = bits
    recipe = {"weight_bits": weight_bits, "levels": 1 << index_bits, "lookup": "each", "goal_sqnr": None}
    chosen = torch.randperm(len(measured.train), generator=torch.Generator().manual_seed(seed))[:1000]
    with quiet():
        compiled = kancompile.compile(measured.model, measured.train[chosen], recipe=recipe, seed=seed)
        module = qat.prepare_compiled(compiled, training)
    before, off_before = _in_runtime(measured, compiled)
    ratio = step_ratio(module, measured.model, measured.train[: _BATCH * _TIMED_STEPS], labels)
    measured.model.eval()
    module.steps.zero_()
    train(module, measured.model, measured.train, labels, epochs, _BATCH, rate, seed=seed)
    written = qat.convert(module)
    after, off = _in_runtime(measured, written)
    with torch.no_grad():
        off_module = sum(int((module(part) != written.program(part)).sum()) for part in measured.parts())
    return Row(
        measured.name,
        weight_bits,
        index_bits,
        training.weights,
        training.index,
        training.tables,
        seed,
        epochs,
        rate,
        measured.float_accuracy,
        control,
        before,
        after,
        measured.float_accuracy - before,
        measured.float_accuracy - after,
        off_module,
        off,
        off_before,
        ratio,
        len(written.model_bytes),
    )


def _in_runtime(measured: Measured, compiled: kancompile.CompiledModel) -> tuple[float, int]:
    """Measure accuracy in ONNX Runtime, and count outputs that differ from the simulation."""
    runtime, differing, outputs = RuntimeModel(compiled.model_bytes), 0, []
    for part in measured.parts():
        found = joined(runtime(part))
        differing += int((found != compiled.program(part)).sum())
        outputs.append(found)
    return measured.accuracy(outputs), differing


def table(rows: Sequence[Row]) -> str:
    """Print rows for people."""
    lines = [
        [
            "model",
            "bits",
            "method",
            "seed",
            "float",
            "trained on",
            "compiled lost",
            "trained lost",
            "differing",
            "step",
            "bytes",
        ]
    ]
    for row in sorted(rows, key=lambda row: (row.model, -row.weight_bits, -row.index_bits, row.weights, row.seed)):
        method = f"{row.weights}, {row.index or 'calibrated'}{', tables' if row.tables else ''}"
        cells = [
            f"W{row.weight_bits}A{row.index_bits}",
            method,
            str(row.seed),
            f"{row.float_accuracy:.2f}",
            f"{row.float_trained:.2f}",
        ]
        cells += [
            f"{row.lost_compiled:.2f}",
            f"{row.lost_trained:.2f}",
            f"{row.differing_module}, {row.differing}",
            f"{row.step_ratio:.2f} x",
        ]
        lines.append([row.model, *cells, f"{row.bytes:,}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def means(rows: Sequence[Row]) -> str:
    """Print mean and standard deviation of points lost over the seeds, where there are several."""
    cells: dict[tuple[str, int, int, str, str | None, float], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.model, row.weight_bits, row.index_bits, row.weights, row.index, row.rate), []).append(row)
    lines = []
    for (model, weight_bits, index_bits, weights, index, rate), found in cells.items():
        if len(found) > 1:
            lost = [[row.lost_compiled for row in found], [row.lost_trained for row in found]]
            texts = [f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}" for values in lost]
            name = f"{model} W{weight_bits}A{index_bits}, {weights}, {index or 'calibrated'}, rate {rate:g}"
            lines.append(f"{name}, {len(found)} seeds: compiled lost {texts[0]}, trained {texts[1]}")
    return "\n".join(lines)


def _bits(text: str) -> tuple[int, int]:
    weight_bits, index_bits = text.split("/")
    return int(weight_bits), int(index_bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with MODEL.safetensors")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: %(default)s")
    parser.add_argument("--bits", type=_bits, nargs="+", default=[(4, 4), (2, 4), (2, 2)], help="weights/index")
    parser.add_argument("--weights", default="lsq", help="method for weights (default: %(default)s)")
    parser.add_argument("--index", default="lsq+", help="method for the row index, or none (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/qat.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = [Row(**row) for row in read_results(arguments.out)] if arguments.out.is_file() else []
    training = qat.Training(arguments.weights, None if arguments.index == "none" else arguments.index)
    for name in arguments.models:
        measured = Measured(name, arguments.data, arguments.checkpoints)
        _, labels = load_split(arguments.data / "mnist.npz", "train")
        control: dict[int, float] = {}
        for seed in arguments.seeds:
            for bits in arguments.bits:
                key = (name, *bits, training.weights, training.index, seed, arguments.epochs, arguments.rate)
                if any(
                    key == (r.model, r.weight_bits, r.index_bits, r.weights, r.index, r.seed, r.epochs, r.rate)
                    for r in rows
                ):
                    continue
                if seed not in control:
                    control[seed] = float_trained(measured, labels, seed, arguments.epochs)
                row = measure(measured, labels, bits, training, seed, arguments.epochs, arguments.rate, control[seed])
                say(table([row]))
                rows.append(row)
                write_results(arguments.out, [asdict(row) for row in rows])
    print("\n".join(text for text in (table(rows), means(rows)) if text))


if __name__ == "__main__":
    main()
