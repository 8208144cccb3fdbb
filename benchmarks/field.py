"""The field: kinds of networks that people build around KAN layers, compiled; a section of docs/compatibility.md.

Run from the root of the repository::

    python -m benchmarks.field
    python -m benchmarks.field --only "U-KAN"     # measures these again and keeps the other rows
    python -m benchmarks.field --check            # compare bytes, worst output and layers with the stored figures

Every network is trained here, then compiled, validated and timed in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kancompile
from benchmarks.compilation_cost import peak_memory
from benchmarks.digit_models import build_seeded
from benchmarks.field_tasks import FIELD, KAN_LAYERS, FieldModel, Tensors, field_model, train_model
from benchmarks.marked_section import FIELD_SECTION, replace_section
from benchmarks.results_file import read_results, write_results
from kancompile.compiler.atomic_write import write_atomically
from kancompile.ir import NamedTensors, Values, arrays_of
from kancompile.progress import quiet
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import FLOAT_EXPORT, benchmark
from kancompile.validation.float_export import FloatExport

BATCHES = (1, 32)
CALIBRATION = 512
FIGURES = Path(__file__).with_name("field.json")
PAGE = Path("docs/compatibility.md")
_MORE_BYTES, _LESS_DB, _SLOWER = 1.02, 0.5, 0.97


def measure(name: str, weights: Path, repeats: int) -> dict[str, Any]:
    """Compile a trained network and compare it with PyTorch and with its float export.

    Args:
        name: of the network.
        weights: its state, as safetensors.
        repeats: blocks of 50 ms a candidate; 0 measures no times.
    """
    model = field_model(name)
    network = build_seeded(model.build).eval()
    network.load_state_dict(load_file(weights))
    examples = model.examples()
    calibration = {key: value[:CALIBRATION] for key, value in examples.part(False)[0].items()}
    inputs, targets = examples.part(True)
    before, start = peak_memory(), time.perf_counter()
    compiled = kancompile.compile(network, _as_passed(calibration))
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak_mib": peak_memory(), "mib_before": before}
    kinds, layers = compiled.manifest["kinds"], compiled.manifest["layers"]
    kans = [layer for layer in layers if layer["name"] not in kinds]
    result = compiled.validate(_as_passed(inputs))
    with torch.no_grad():
        outputs = network(*inputs.values())
    read = _values({key: value.float() if value.is_floating_point() else value for key, value in inputs.items()})
    of_file = [torch.from_numpy(array) for array in RuntimeModel(compiled.model_bytes).run(arrays_of(read))]
    found |= {
        "kan_layers": count_kan_layers(network, inputs),
        "kan_layers_found": len(kans),
        "kan_layers_integer": sum(layer.get("precision", "int8") == "int8" for layer in kans),
        "worst_db": result.compiled.worst_db,
        "sqnr_db": result.compiled.sqnr_db,
        "float_score": model.score(outputs if isinstance(outputs, tuple) else [outputs], targets),
        "compiled_score": model.score(of_file, targets),
        "bytes": len(compiled.model_bytes),
        "left_in_float": compiled.manifest["left_in_float"],
    }
    if repeats:
        found["float_bytes"] = len(FloatExport(network, read).result())
        timed = benchmark(compiled.model_bytes, network, BATCHES, [1], repeats=repeats, data=read)
        found["times"] = {
            str(batch): {t.candidate: t.median for t in timed.timings if t.batch_size == batch} for batch in BATCHES
        }
        found["faster"] = {str(batch): timed.ratio(FLOAT_EXPORT, batch, 1) for batch in BATCHES}
    return found


def _as_passed(tensors: Tensors) -> Any:
    """Give samples as users pass them: an array, or arrays by name."""
    arrays = {name: value.numpy() for name, value in tensors.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def _values(tensors: Tensors) -> Values:
    return NamedTensors(tensors) if len(tensors) > 1 else next(iter(tensors.values()))


def count_kan_layers(network: nn.Module, inputs: Tensors) -> int:
    """Count the KAN layers that two samples pass."""
    passed: set[int] = set()
    handles = [
        module.register_forward_hook(lambda module, x, y: passed.add(id(module)))
        for module in network.modules()
        if isinstance(module, KAN_LAYERS)
    ]
    with torch.no_grad():
        network(*(value[:2] for value in inputs.values()))
    for handle in handles:
        handle.remove()
    return len(passed)


def measured(model: FieldModel, repeats: int) -> dict[str, Any]:
    """Train a network, and measure it in a child process; an error is the only entry of its row."""
    network = train_model(model, model.examples())
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, weights)
        command = [sys.executable, "-m", "benchmarks.field", "--measure", model.name, str(weights)]
        child = subprocess.run([*command, "--repeats", str(repeats)], capture_output=True, text=True, check=False)
    if child.returncode:
        said = child.stderr.strip().splitlines()[-1]
        return {"error": said.removeprefix("kancompile.errors.exceptions.KanCompileError: ")}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def section(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the rows as a section of Markdown, and what stands out below them."""
    head = ["network", "KAN layers", "found", "integer", "worst output", "float", "compiled", "bytes", "smaller"]
    head += [*(f"faster, batch {batch}" for batch in BATCHES), "compile", "peak memory", "most of the time in float"]
    lines = [HEAD, "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [f"| {name} | " + " | ".join(_cells(row)) + " |" for name, row in rows.items()]
    compiled = {name: row for name, row in rows.items() if "error" not in row}
    lost = [name for name, row in compiled.items() if row["kan_layers_integer"] < row["kan_layers"]]
    ruined = [f"{name} ({row['worst_db']:.1f} dB)" for name, row in compiled.items() if row["worst_db"] < 30]
    held = [
        f"{name} ({', '.join(found)}; {_longest(row) or 'all of it is in integers'})"
        for name, row in compiled.items()
        if (found := behind(row))
    ]
    lines += ["", f"{len(compiled)} of {len(rows)} networks compile."]
    lines += [f"KAN layers that are not integer layers: {', '.join(lost) or 'none'}."]
    lines += [f"Worst output below 30 dB: {', '.join(ruined) or 'none'}."]
    lines += [f"Larger or slower than the float export, and what stays in float: {', '.join(held) or 'none'}."]
    lines += [f"{name}: {' '.join(row['error'].split())}" for name, row in rows.items() if "error" in row]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return ["does not compile", *[""] * 12]
    return [
        *(str(row[key]) for key in ("kan_layers", "kan_layers_found", "kan_layers_integer")),
        f"{row['worst_db']:.1f} dB",
        _scores(row["float_score"]),
        _scores(row["compiled_score"]),
        f"{row['bytes']:,}",
        f"{row['float_bytes'] / row['bytes']:.1f}x",
        *(f"{row['faster'][str(batch)]:.1f}x" for batch in BATCHES),
        f"{row['seconds']:.0f} s",
        f"{row['peak_mib']:,.0f} MiB",
        _longest(row),
    ]


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.3f}" if name == "loss" else f"{name} {value:.1f} %" for name, value in scores.items()
    )


def _longest(row: Mapping[str, Any]) -> str:
    """Name the operator left in float that takes most of the time by the estimate."""
    left = row["left_in_float"]
    return f"{left[0]['count']} x {left[0]['operator']}, {100 * left[0]['share']:.0f} %" if left else ""


def behind(row: Mapping[str, Any]) -> list[str]:
    """Say in what a file is behind the float export: bytes, or time at a batch size."""
    found = [f"{row['bytes'] / row['float_bytes']:.1f} times as large"] if row["bytes"] > row["float_bytes"] else []
    return found + [f"{ratio:.2f}x at batch {batch}" for batch, ratio in row["faster"].items() if ratio < _SLOWER]


HEAD = """## The field

Generated by `python -m benchmarks.field`; do not edit. Networks of the kinds that people build around KAN layers, written as they
write them (`benchmarks/field_*.py`), trained for some seconds on scikit-learn's digits in
several forms, on the characters of the license, or on an equation, compiled by the default recipe and measured on test data in
ONNX Runtime, one thread:

* **KAN layers**, **found**, **integer**: in the network, in the file, and in the file as integers;
* **worst output**: signal about its mean over error, at the worst output;
* **float**, **compiled**: the measure of the task, R2 in percent;
* **smaller**, **faster**: bytes and times of the float ONNX export over those of the file, interleaved in one process, medians;
* **compile**, **peak memory**: of a process of its own, which holds PyTorch and the exporter too;
* **most of the time in float**: the operators of one kind that no layer took up, by the estimate of the report.
"""


def worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what got worse: an error, bytes by 2 %, the worst output by 0.5 dB, or integer KAN layers."""
    if "error" in after:
        return [] if "error" in before else [after["error"]]
    if "error" in before:
        return []
    found = {"bytes": after["bytes"] > _MORE_BYTES * before["bytes"]}
    found["worst_db"] = not after["worst_db"] >= before["worst_db"] - _LESS_DB
    found["kan_layers_integer"] = after["kan_layers_integer"] < before["kan_layers_integer"]
    return [f"{key} {before[key]:,.6g} -> {after[key]:,.6g}" for key, is_worse in found.items() if is_worse]


def main() -> int:
    """Measure and write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only networks whose name contains this")
    parser.add_argument("--repeats", type=int, default=15, help="blocks of 50 ms a candidate (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with the stored figures; write nothing")
    parser.add_argument("--results", type=Path, default=FIGURES, help="JSON file of the figures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=PAGE, help="page that holds the section (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "WEIGHTS"), help="what the child process is told to do")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]), arguments.repeats)))
        return 0
    known = read_results(arguments.results) if arguments.results.is_file() else {}
    chosen = [model for model in FIELD if arguments.only in model.name]
    if arguments.check:
        return check(chosen, known)
    for model in chosen:
        known[model.name] = measured(model, arguments.repeats)
        print(f"{model.name}: {' | '.join(_cells(known[model.name]))}", flush=True)
    rows = {model.name: known[model.name] for model in FIELD if model.name in known}
    write_results(arguments.results, rows)
    text = replace_section(arguments.out.read_text(encoding="utf-8"), FIELD_SECTION, section(rows))
    write_atomically({arguments.out: text.encode()}, force=True)
    return 0


def check(models: Sequence[FieldModel], known: Mapping[str, Any]) -> int:
    """Measure all but times again, print what got worse, and give the exit code."""
    failed = 0
    for model in models:
        row = measured(model, 0)
        found = worse(known[model.name], row) if model.name in known else []
        failed += bool(found)
        print(f"{model.name}: {'; '.join(found) or 'as good' if model.name in known else 'not stored'}", flush=True)
    print(f"{failed} of {len(models)} got worse")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
