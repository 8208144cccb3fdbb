"""Count the instructions of one inference of the MNIST network with and without joint lookups: aarch64 and Cortex-M, emulated.

    python -m benchmarks.instructions --data FOLDER --checkpoint mnist_efficient_kan.safetensors --qemu usr/bin/qemu-aarch64

ONNX Runtime on aarch64 is counted by the plugin of :mod:`benchmarks.count_costs`, which says what it takes; target ``c99`` on
Cortex-M cores by :mod:`examples.c99.cortex_m`. What is missing is left out; outputs of the
firmware are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kancompile
from benchmarks.count_costs import instructions
from benchmarks.latency import PERCEPTRON, perceptron
from benchmarks.measured_models import MNIST_WIDTHS, MeasuredModel, mnist_model
from benchmarks.results_file import write_results
from examples.c99 import cortex_m
from kancompile.progress import quiet, say
from kancompile.runtimes.emulation import ARM64
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import FLOAT_EXPORT
from kancompile.validation.float_export import export_float

RECIPES: dict[str, dict[str, Any]] = {"lookup each": {"lookup": "each"}, "default": {}}
BITS = (4, 8)
_SAMPLES = 16


@dataclass(frozen=True)
class Firmware:
    """A model of target ``c99`` on a core; bytes and instructions as in :class:`examples.c99.cortex_m.Run`."""

    recipe: str
    bits: int
    core: str
    flash: int
    state: int
    stack: int
    instructions: int
    differing: int


def on_aarch64(measured: MeasuredModel, qemu: Path, processor: str, batches: list[int]) -> dict[str, dict[int, int]]:
    """Count instructions of a call of every candidate, by batch size."""
    samples = measured.calibration.numpy()
    files = {FLOAT_EXPORT: export_float(measured.model, tuple(samples.shape[1:]))}
    for name, recipe in (RECIPES | {"default, for_batch = 1": {"for_batch": 1}}).items():
        files[name] = _compiled(measured, recipe).model_bytes
    files[PERCEPTRON] = perceptron(MNIST_WIDTHS, samples)
    runs = [(name, content, batch) for name, content in files.items() for batch in batches]
    feeds = [_feeds(content, measured.test[:batch].numpy()) for _, content, batch in runs]
    say(f"counting {len(runs)} calls on aarch64 ...")
    models = [(content, feed) for (_, content, _), feed in zip(runs, feeds, strict=True)]
    counted = instructions(qemu, processor, models)
    found: dict[str, dict[int, int]] = {name: {} for name in files}
    for (name, _, batch), count in zip(runs, counted, strict=True):
        found[name][batch] = count
    return found


def _feeds(content: bytes, x: np.ndarray[Any, Any]) -> Mapping[str, np.ndarray[Any, Any]]:
    return {next(iter(RuntimeModel(content).input_shapes)): x}


def _compiled(measured: MeasuredModel, recipe: dict[str, Any], target: str = "ort-cpu") -> kancompile.CompiledModel:
    say(f"compiling {recipe} for {target} ...")
    with quiet():
        return kancompile.compile(measured.model, measured.calibration, recipe=recipe, target=target)


def on_cortex_m(measured: MeasuredModel) -> list[Firmware]:
    """Build and run the network for every core, recipe and width that fits."""
    x, found = measured.test[:_SAMPLES], []
    for name, recipe in RECIPES.items():
        for bits in BITS:
            asked = recipe | {"weight_bits": bits}
            compiled = _compiled(measured, asked, "c99")
            expected = RuntimeModel(_compiled(measured, asked).model_bytes).run(x.numpy())[0]
            for core in cortex_m.CORES:
                try:
                    done = cortex_m.run(core, compiled.model_bytes, compiled.companions[".h"], x.numpy())
                except RuntimeError as error:
                    say(f"{name}, {bits} bits, {core.name}: {str(error).splitlines()[-1]}")
                    continue
                differing = int((done.outputs != expected.reshape(done.outputs.shape)).sum())
                taken = (done.flash, done.state, done.stack, done.instructions)
                found.append(Firmware(name, bits, core.name, *taken, differing))
    return found


def main() -> None:
    """Count, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--checkpoint", type=Path, help="weights of the MNIST model (.safetensors), else it is trained")
    parser.add_argument("--epochs", type=int, default=8, help="passes of training without --checkpoint")
    parser.add_argument("--qemu", type=Path, help="qemu-aarch64 that loads plugins, see benchmarks/count_costs.py")
    parser.add_argument("--processor", choices=ARM64, default="dotprod", help="class of kernels (default dotprod)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 256], help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/instructions.json"))
    options = parser.parse_args()
    measured = mnist_model(options.data, options.checkpoint, options.epochs)
    results: dict[str, Any] = {}
    if options.qemu is not None:
        counted = on_aarch64(measured, options.qemu, options.processor, options.batch_sizes)
        results[f"aarch64 {options.processor}"] = counted
        for name, of_batch in counted.items():
            print(f"{name:<36}" + "".join(f"  batch {batch}: {count:>12,}" for batch, count in of_batch.items()))
    if (problem := cortex_m.missing()) is None:
        rows = on_cortex_m(measured)
        results["cortex-m"] = [asdict(row) for row in rows]
        for row in rows:
            print(
                f"{row.core:<11} {row.bits} bits  {row.recipe:<12} flash {row.flash:>8,}  state {row.state:>6,}  "
                f"stack {row.stack:>5,}  instructions {row.instructions:>10,}  {row.differing} outputs differ"
            )
    else:
        say(problem)
    write_results(options.out, results)


if __name__ == "__main__":
    main()
