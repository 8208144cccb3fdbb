"""Compare compiled KANs with the bare integer products they contain: what is left is the price of the basis functions.

Run from the root of the repository::

    python -m benchmarks.limit --data FOLDER [--checkpoint mnist_efficient_kan.safetensors]

The bound is a file with one QGemm for each contraction of the compiled file, of the same shapes, weights and kind of
output, whose uint8 inputs are given. "Tax" is (whole model / bare products) - 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import kancompile
from benchmarks.measured_models import MeasuredModel, add_model_arguments, measured_models
from benchmarks.results_file import write_results
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.ir import IntegerContraction
from kancompile.progress import quiet, say
from kancompile.runtimes.machine import describe_machine
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import COMPILED, take_turns
from kancompile.validation.kernel_audit import audit_kernels

CONTRACTIONS = "bare integer products"
_OPSET, _IR_VERSION = 21, 10


def contractions_file(compiled: CompiledModel) -> bytes:
    """Write the contractions of a compiled model side by side, each with an input and an output of its own.

    Raises:
        SystemExit: a contraction has several scale groups, or ONNX Runtime does not run all of them as QGemm.
    """
    nodes, initializers, inputs, outputs = [], [], [], []
    for number, layer in enumerate(compiled.program.layers()):
        contraction = compiled.program.module(layer.contraction)
        if not isinstance(contraction, IntegerContraction) or contraction.geometry or len(contraction.group_sizes) != 1:
            raise SystemExit(f"layer {layer.name!r}: found {contraction!r}, expected one integer product")
        name = f"product_{number}"
        codes, scale = contraction.weights[0].numpy(), contraction.scales[0].numpy()
        bias = contraction.bias.numpy()
        constants: dict[str, NDArray[Any]] = {
            "one": np.array(1, np.float32),
            "zero": np.array(0, np.uint8),
            "weight": codes,
            "scale": scale,
            "weight_zero": np.zeros(len(scale), np.int8),
            "bias": bias,
            "bias_zero": np.zeros(len(scale), np.int32),
        }
        nodes += [
            helper.make_node("DequantizeLinear", _named(name, "columns", "one", "zero"), _named(name, "x")),
            helper.make_node(
                "DequantizeLinear", _named(name, "weight", "scale", "weight_zero"), _named(name, "w"), axis=1
            ),
            helper.make_node("DequantizeLinear", _named(name, "bias", "scale", "bias_zero"), _named(name, "b"), axis=0),
            helper.make_node("Gemm", _named(name, "x", "w", "b"), _named(name, "y"), name=f"{name}/Gemm"),
        ]
        inputs.append(helper.make_tensor_value_info(f"{name}.columns", TensorProto.UINT8, ["batch", codes.shape[0]]))
        kind, result = TensorProto.FLOAT, f"{name}.y"
        if contraction.output is not None:
            constants["out_scale"] = np.array(contraction.output.scale, np.float32)
            constants["out_zero"] = np.array(contraction.output.zero_point, np.uint8)
            kind, result = TensorProto.UINT8, f"{name}.rows"
            names = _named(name, "y", "out_scale", "out_zero")
            nodes.append(helper.make_node("QuantizeLinear", names, [result]))
        initializers += [numpy_helper.from_array(value, f"{name}.{key}") for key, value in constants.items()]
        outputs.append(helper.make_tensor_value_info(result, kind, ["batch", codes.shape[1]]))
    graph = helper.make_graph(nodes, "contractions", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    operators = audit_kernels(content).operators
    if operators != {"QGemm": len(inputs)}:
        raise SystemExit(f"the bare products run as {operators!r}, expected {len(inputs)} QGemm and nothing else")
    return content


def _named(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


def random_columns(session: onnxruntime.InferenceSession, batch: int) -> dict[str, NDArray[np.uint8]]:
    """Draw table codes for every input of the bare products."""
    rng = np.random.default_rng(0)
    return {value.name: rng.integers(0, 256, (batch, value.shape[1]), dtype=np.uint8) for value in session.get_inputs()}


def profile_operators(model: bytes, x: NDArray[np.float32], calls: int = 200) -> dict[str, dict[str, float]]:
    """Let ONNX Runtime's own profiler say where the time goes, one thread.

    Returns:
        for each operator its seconds a call of the model and its share of all operators' time, largest first.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        for _ in range(calls):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    durations: dict[str, dict[str, list[int]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["args"]["op_name"], {}).setdefault(event["name"], []).append(event["dur"])
    # the median over the calls of each node: the first ones are cold, and other work may interrupt some
    seconds = {
        operator: sum(float(np.median(spent)) for spent in nodes.values()) * 1e-6
        for operator, nodes in durations.items()
    }
    total = sum(seconds.values())
    ordered = sorted(seconds, key=lambda operator: -seconds[operator])
    return {operator: {"seconds": seconds[operator], "share": seconds[operator] / total} for operator in ordered}


def measure_limit(measured: MeasuredModel, batch_sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Time the compiled file and its bare products in turns, one thread, and profile the file."""
    with quiet():
        compiled = kancompile.compile(measured.model, measured.calibration)
    products = contractions_file(compiled)
    whole = RuntimeModel(compiled.model_bytes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    bare = onnxruntime.InferenceSession(products, options, providers=["CPUExecutionProvider"])
    found = []
    for batch in batch_sizes:
        say(f"{measured.name}: timing batch {batch} ...")
        x = measured.test[:batch].contiguous().numpy()
        columns = random_columns(bare, batch)
        runnable: dict[str, Callable[[], Any]] = {
            COMPILED: partial(whole.run, x),
            CONTRACTIONS: partial(bare.run, None, columns),
        }
        timings = {timing.candidate: timing for timing in take_turns(runnable, batch, 1, repeats, 3, {})}
        tax = timings[COMPILED].median / timings[CONTRACTIONS].median - 1
        found.append(
            {
                "batch_size": batch,
                "tax": tax,
                "timings": [asdict(timing) for timing in timings.values()],
                "operators": profile_operators(compiled.model_bytes, x),
            }
        )
    return {"machine": describe_machine(), "batches": found}


def limit_table(name: str, found: dict[str, Any]) -> str:
    """Print the tax and the profile for people."""
    lines = [name, f"  {'batch':>5}  {'whole':>10}  {'products':>10}  {'tax':>6}  operators, us a call and share"]
    for row in found["batches"]:
        whole, bare = (timing["median"] * 1e6 for timing in row["timings"])
        spent = ", ".join(
            f"{operator} {part['seconds'] * 1e6:.0f} ({100 * part['share']:.0f} %)"
            for operator, part in row["operators"].items()
        )
        lines.append(f"  {row['batch_size']:>5}  {whole:>7.1f} us  {bare:>7.1f} us  {row['tax']:>6.2f}  {spent}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/limit.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for measured in measured_models(arguments):
        results[measured.name] = measure_limit(measured, arguments.batch_sizes, arguments.repeats)
        write_results(arguments.out, results)
        print(limit_table(measured.name, results[measured.name]), flush=True)


if __name__ == "__main__":
    main()
