"""Time compiled KANs beside everything else that runs the same network, in turns, in one run.

Run from the root of the repository::

    python -m benchmarks.latency --data FOLDER [--checkpoint mnist_efficient_kan.safetensors]

Also shows what each candidate costs in accuracy and bytes, and what the compilation costs in time and memory.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kancompile
from benchmarks.compilation_cost import measure_compilation
from benchmarks.generic_quantization import dynamic_int8, static_int8
from benchmarks.measured_models import (
    MNIST_WIDTHS,
    WIDE_WIDTHS,
    MeasuredModel,
    add_model_arguments,
    measured_models,
)
from benchmarks.results_file import write_results
from kancompile.ir import joined
from kancompile.progress import quiet, say
from kancompile.runtimes.machine import describe_machine
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import (
    COMPILED,
    EAGER,
    FLOAT_EXPORT,
    Benchmark,
    Timing,
    take_turns,
    torch_threads,
)
from kancompile.validation.error_measures import ErrorMeasure, plain_number
from kancompile.validation.float_export import export_float
from kancompile.validation.task_metrics import TaskMetric

EACH = "compiled, each input looked up"
POLYNOMIAL = "compiled to float polynomials"
STATIC = "quantize_static of the export"
DYNAMIC = "quantize_dynamic of the export"
PERCEPTRON = "int8 perceptron of these widths"


def build_files(measured: MeasuredModel, unavailable: dict[str, str]) -> dict[str, bytes]:
    """Make the ONNX file of every candidate; those that cannot be made are listed with the reason."""
    with quiet():
        files = {COMPILED: kancompile.compile(measured.model, measured.calibration).model_bytes}
    samples = measured.calibration.numpy()
    files[FLOAT_EXPORT] = export_float(measured.model, tuple(samples.shape[1:]))
    name = next(iter(RuntimeModel(files[FLOAT_EXPORT]).input_shapes))
    makers: dict[str, Callable[[], bytes]] = {
        EACH: lambda: _looking_each_up(measured),
        POLYNOMIAL: lambda: _float_lowering(measured),
        STATIC: lambda: static_int8(files[FLOAT_EXPORT], samples, name),
        DYNAMIC: lambda: dynamic_int8(files[FLOAT_EXPORT]),
    }
    for candidate, make in makers.items():
        say(f"{measured.name}: {candidate} ...")
        try:
            content = make()
            RuntimeModel(content)
            files[candidate] = content
        except Exception as error:  # foreign tools fail in their own ways
            unavailable[candidate] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return files


def _looking_each_up(measured: MeasuredModel) -> bytes:
    with quiet():
        return kancompile.compile(measured.model, measured.calibration, recipe={"lookup": "each"}).model_bytes


def perceptron(widths: Sequence[int], samples: np.ndarray[Any, Any]) -> bytes:
    """Make the file of an int8 network of ordinary layers, of no use but for its time: weights are drawn."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    content = export_float(model, tuple(samples.shape[1:]))
    return static_int8(content, samples, next(iter(RuntimeModel(content).input_shapes)))


def _float_lowering(measured: MeasuredModel) -> bytes:
    with quiet():
        compiled = kancompile.compile(measured.model, measured.calibration, recipe={"precision": "float"})
    forms = {part["form"] for layer in compiled.manifest["layers"] for part in layer["expansions"]}
    if "PolynomialExpansion" not in forms:
        raise RuntimeError(f"found expansions of the forms {sorted(forms)!r}, expected a polynomial among them")
    return compiled.model_bytes


def measure_quality(measured: MeasuredModel, files: dict[str, bytes], batch: int = 500) -> dict[str, dict[str, Any]]:
    """Compare the outputs of every file with float PyTorch on all test samples."""
    parts = measured.test.split(batch)
    with torch.no_grad():
        reference = [measured.model(part) for part in parts]
    found = {EAGER: _quality(measured, reference, reference) | {"bytes": None}}
    for candidate, content in files.items():
        runtime = RuntimeModel(content)
        outputs = [joined(runtime(part)) for part in parts]
        found[candidate] = _quality(measured, reference, outputs) | {"bytes": len(content)}
    return found


def _quality(measured: MeasuredModel, reference: list[Tensor], outputs: list[Tensor]) -> dict[str, Any]:
    error, task = ErrorMeasure(), TaskMetric()
    for expected, output in zip(reference, outputs, strict=True):
        error.add(expected, output, measured.name)
    quality: dict[str, Any] = {
        "sqnr_db": plain_number(error.sqnr_db),
        "worst_db": plain_number(error.worst_db),
        "top1_agreement": error.agreement,
    }
    if measured.labels is not None:
        task.add(measured.labels, torch.cat(outputs), measured.name)
        quality |= task.values()
    return quality


def time_candidates(
    measured: MeasuredModel,
    files: dict[str, bytes],
    batch_sizes: list[int],
    threads: list[int],
    repeats: int,
    unavailable: dict[str, str],
) -> Benchmark:
    """Time all files and the model in PyTorch, in turns."""
    machine = describe_machine()
    timings: list[Timing] = []
    for count in threads:
        sessions = {candidate: RuntimeModel(content, count) for candidate, content in files.items()}
        for batch in batch_sizes:
            say(f"{measured.name}: timing batch {batch}, {count or 'all'} threads ...")
            x = measured.test[:batch].contiguous()
            runnable = {name: _call(session, x.numpy()) for name, session in sessions.items()}
            runnable[EAGER] = _eager(measured.model, x)
            with torch_threads(count), torch.no_grad():
                timings += take_turns(runnable, batch, count, repeats, 3, unavailable)
    return Benchmark(measured.name, tuple(timings), unavailable, machine)


def _call(session: RuntimeModel, x: np.ndarray[Any, Any]) -> Callable[[], Any]:
    return lambda: session.run(x)


def _eager(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def quality_table(quality: dict[str, dict[str, Any]]) -> str:
    """Print accuracy, error and size for people."""
    width = max(map(len, quality))
    lines = [f"  {'candidate':<{width}}  {'accuracy':>8}  {'SQNR dB':>8}  {'worst dB':>8}  {'bytes':>10}"]
    for candidate, row in quality.items():
        accuracy = f"{row['accuracy']:.2f}" if "accuracy" in row else ""
        sqnr, worst = (
            f"{value:.2f}" if isinstance(value, float) else value for value in (row["sqnr_db"], row["worst_db"])
        )
        size = "" if row["bytes"] is None else f"{row['bytes']:,}"
        lines.append(f"  {candidate:<{width}}  {accuracy:>8}  {sqnr:>8}  {worst:>8}  {size:>10}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: one per core (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/latency.json"), help="default: %(default)s"
    )
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    for measured, widths in zip(measured_models(arguments), (MNIST_WIDTHS, WIDE_WIDTHS), strict=True):
        unavailable: dict[str, str] = {}
        files = build_files(measured, unavailable)
        quality = measure_quality(measured, files)
        cost = measure_compilation(measured, widths)
        made = {PERCEPTRON: perceptron(widths, measured.calibration.numpy())}
        timed = time_candidates(
            measured, files | made, arguments.batch_sizes, arguments.threads, arguments.repeats, unavailable
        )
        results[measured.name] = timed.to_dict() | {"quality": quality, "compilation": cost}
        write_results(arguments.out, results)
        print(timed.table())
        print(quality_table(quality))
        print(
            f"  compiled with {cost['samples']} samples on {cost['cores']} cores in {cost['seconds']:.1f} s, "
            f"peak memory {cost['peak_mib']:.0f} MiB ({cost['mib_before']:.0f} MiB before)\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
