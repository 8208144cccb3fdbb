"""The summary that a compilation prints: what changed, what every layer costs, and warnings, heaviest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kancompile.compiler import CompiledModel
from kancompile.reporting.facts import kernels_of, parameter_bytes
from kancompile.reporting.render.html_parts import number
from kancompile.validation import Validation, aligned

_DEVICE_FACTS = {
    "stored_bytes": "flash bytes of constants",
    "ram_bytes": "ram bytes",
    "products": "multiplications with a weight for one sample, which is at least half as many cycles on a Cortex-M",
}
_WORTH_A_LINE = ("error gate:",)


def compile_summary(compiled: CompiledModel, result: Validation, judged_on: str) -> str:
    """Write the summary of a compilation.

    Args:
        compiled: its result.
        result: what was measured.
        judged_on: on which data, in words.
    """
    manifest = compiled.manifest
    count = len(manifest["layers"])
    lines = [f"{count} KAN layer{'s' if count != 1 else ''} for {manifest['target']}, measured on {judged_on}", ""]
    lines += aligned(_results(compiled, result), last_left=True)
    lines += ["", *aligned(_layers(compiled, result), last_left=True)]
    lines += [f"{meaning}: {manifest[key]:,}" for key, meaning in _DEVICE_FACTS.items() if key in manifest]
    if result.runtime is not None:
        lines += ["", f"simulation and ONNX Runtime: {_differing(result)}"]
    found = _warnings(compiled, result)
    return "\n".join([*lines, *(f"{severity}: {text}" for severity, text in found)])


def _results(compiled: CompiledModel, result: Validation) -> list[list[str]]:
    rows = [["", "float", "compiled", ""]]
    for name in result.metrics.get("float", {}):
        before, after = result.metrics["float"][name], result.metrics["compiled"][name]
        unit = " %" if name in ("accuracy", "r2") else ""
        change = f"{after - before:+.2f} points" if unit and after != before else ""
        rows.append([name, f"{before:.4g}{unit}", f"{after:.4g}{unit}", change or ("equal" if after == before else "")])
    rows.append(["SQNR", "", f"{result.compiled.sqnr_db:.2f} dB", f"largest error {result.compiled.largest:.3g}"])
    if result.compiled.agreement is not None:
        rows.append(["same argmax", "", f"{result.compiled.agreement:.2f} %", ""])
    before_bytes = parameter_bytes(compiled.reference)
    size = len(compiled.model_bytes)
    ratio = "" if before_bytes is None else f"1/{before_bytes / size:.1f} of the parameters"
    rows.append(["bytes", "" if before_bytes is None else f"{before_bytes:,}", f"{size:,}", ratio])
    return rows


def _layers(compiled: CompiledModel, result: Validation) -> list[list[str]]:
    layers = compiled.manifest["layers"]
    errors = {error.layer: error for error in result.layers}
    names = [layer["name"] for layer in layers]
    rows = [["layer", "inputs x functions", "outputs", "bits", "levels", "bytes", "SQNR dB", "kernel"]]
    for layer in layers:
        kernels = [
            f"{kernel['operator']}{'' if kernel['is_integer'] else ' (float)'}"
            for kernel in kernels_of(layer["name"], names, compiled.audit)
        ]
        tables = sum(entry.get("table_bytes", 0) for entry in layer["expansions"])
        error = errors.get(layer["name"])
        rows.append(
            [
                layer["name"],
                " + ".join(f"{entry['n_in']} x {entry['k']}" for entry in layer["expansions"]),
                str(layer["n_out"]),
                str(layer["weight_bits"]),
                " + ".join(dict.fromkeys(_levels(entry) for entry in layer["expansions"])),
                f"{layer['weight_bytes'] + tables:,}",
                "" if error is None else f"{error.sqnr_db:.2f}",
                ", ".join(dict.fromkeys(kernels)) or "float operators",
            ]
        )
    return rows


def _levels(entry: Mapping[str, Any]) -> str:
    rows = entry.get("levels", entry.get("rows"))
    return "" if rows is None else str(rows)


def _differing(result: Validation) -> str:
    assert result.runtime is not None
    by = f", by at most {number(result.runtime.largest)}" if result.runtime.differing else ""
    return f"{result.runtime.differing} of {result.runtime.count} outputs differ{by}"


def _warnings(compiled: CompiledModel, result: Validation) -> list[tuple[str, str]]:
    manifest = compiled.manifest
    found = [("missed", reason) for reason in result.reasons]
    # a layer that was not rounded is meant to be float
    integer = {layer["name"] for layer in manifest["layers"] if layer["weight_bits"] <= 8}
    float_rows = [row for row in compiled.audit.rows if not row.is_integer]
    found += [
        ("warning", f"{row.node} runs as float {row.operator}")
        for row in float_rows
        if any(row.node.startswith(f"{name}/") for name in integer)
    ]
    found += [
        ("warning", f"{name}: constant dequantized at every call") for name in compiled.audit.dequantized_constants
    ]
    found += [("warning", note) for note in manifest["notes"] if note.startswith(_WORTH_A_LINE)]
    found += [
        ("note", f"in float: {part['count']} x {part['operator']}, {part['reason']}")
        for part in manifest["left_in_float"]
    ]
    found += [("note", _not_a_layer(part)) for part in manifest["unrecognized"]]
    found += [("note", text) for text in manifest["calibration"]["notes"]]
    return list(dict.fromkeys(found))


def _not_a_layer(part: Mapping[str, Any]) -> str:
    return f"not a KAN layer: {part['operator']} ({part['reason']}) {part['source']}".rstrip()
