"""The summary that a compilation prints: what changed, what every layer costs, and warnings, the last one read first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kancompile.compiler import CompiledModel
from kancompile.ir import Program
from kancompile.reporting.facts import (
    computes_in_float,
    count_layers,
    float_text,
    functions_text,
    goal_missed,
    kernels_of,
    needs_int16,
    not_layers,
    worse_than_float,
)
from kancompile.reporting.render.html_parts import number
from kancompile.validation import BesideFloat, OutputError, Validation, aligned, number_of, title

_DEVICE_FACTS = {
    "stored_bytes": "flash bytes of constants",
    "ram_bytes": "ram bytes",
    "products": "multiplications with a weight for one sample, which is at least half as many cycles on a Cortex-M",
}
_OF_THE_MODEL = "model:"
_OF_JOINT_LOOKUPS = (" functions replaced by ", "so each input is looked up by itself", "looks up single inputs only")
_REFINED, _WIDENED, _OF_THE_DATA = "error gate:", "precision = ", ("inputs:", "fresh data:")


def compile_summary(
    compiled: CompiledModel,
    result: Validation,
    judged_on: str,
    beside: BesideFloat | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write the summary of a compilation.

    Args:
        compiled: its result.
        result: what was measured.
        judged_on: on which data, in words.
        beside: the file beside the float export, where that was measured.
        notes: what else a reader should know.
    """
    manifest = compiled.manifest
    counted = count_layers({layer["name"]: layer.get("uses", 1) for layer in manifest["layers"]}, manifest["kinds"])
    lines = [f"{counted} for {manifest['target']}, measured on {judged_on}", *_sizes(compiled.program), ""]
    lines += aligned(_results(compiled, result, beside), last_left=True)
    lines += ["", *aligned(_layers(compiled, result), last_left=True)]
    lines += [f"{meaning}: {manifest[key]:,}" for key, meaning in _DEVICE_FACTS.items() if key in manifest]
    if result.runtime is not None:
        lines += ["", f"simulation and ONNX Runtime: {_differing(result)}"]
    found = [*(("note", text) for text in notes), *_warnings(compiled, result, beside)]
    return "\n".join([*lines, *(f"{severity}: {text}" for severity, text in found)])


def _results(compiled: CompiledModel, result: Validation, beside: BesideFloat | None) -> list[list[str]]:
    rows = [["", "float", "compiled", ""]]
    for name in result.metrics.get("float", {}):
        before, after = (result.metrics[kind][name] for kind in ("float", "compiled"))
        change = f"{after - before:+.4f}" if name == "r2" and after != before else ""
        if name == "accuracy" and result.paired is not None:
            change = result.paired.text()
        rows.append([title(name), number_of(name, before), number_of(name, after), change])
        if name == "accuracy" and result.paired is not None:
            rows.append(result.paired.interval_row())
    error, worst = result.compiled, result.compiled.worst
    assert worst is not None
    rows.append(["SQNR", "", f"{error.sqnr_db:.2f} dB", "relative to the variance of the outputs"])
    among = "" if error.parts else f" of 0 ... {error.n_outputs - 1}"
    which = "" if error.n_outputs == 1 else f" ({worst.called}{among})"
    rows.append([f"worst output{which}", "", f"{worst.sqnr_db:.2f} dB", _shares(worst)])
    for name, part in error.parts.items():
        rows.append([f"  output {name}", "", f"{part.sqnr_db:.2f} dB", f"worst {part.worst_db:.2f} dB"])
    if result.is_classifier and error.agreement is not None:
        rows.append(["top-1 agreement", "", f"{error.agreement:.2f} %", ""])
    return rows + _beside(compiled, beside)


def _beside(compiled: CompiledModel, beside: BesideFloat | None) -> list[list[str]]:
    """Set bytes and times beside those of the float export."""
    manifest = compiled.manifest
    if "stored_bytes" in manifest:
        return []  # source code has no size that matters; flash and RAM follow
    size = len(compiled.model_bytes)
    if beside is None:
        return [["bytes", "", f"{size:,}", ""]]
    if beside.float_bytes is None:
        rows = [["bytes", "", f"{size:,}", ""]]
    else:
        rows = [
            ["bytes", f"{beside.float_bytes:,}", f"{size:,}", _factor(beside.float_bytes / size, "smaller", "larger")]
        ]
    for time in beside.times:
        one = [f"{seconds * 1e6 / time.batch:,.4g} us" for seconds in (time.float_seconds, time.compiled_seconds)]
        each = "a sample" if time.batch == 1 else f"a sample, {time.batch} at once"
        rows.append(
            [f"time for {each}", *one, f"{_factor(time.ratio, 'faster', 'slower')} than {beside.timed}, one thread"]
        )
    return rows


def _factor(ratio: float, better: str, worse: str) -> str:
    """Say a ratio in the direction that it has."""
    return f"{ratio:.1f} times {better}" if ratio >= 1 else f"{1 / ratio:.1f} times {worse}"


def _shares(worst: OutputError) -> str:
    """Say an error beside what it is compared with."""
    if worst.is_constant or worst.largest_share is None:
        return worst.text()
    return (
        f"rms error {100 * worst.rms_share:.2g} % of its spread, largest {100 * worst.largest_share:.2g} % of its range"
    )


def _layers(compiled: CompiledModel, result: Validation) -> list[list[str]]:
    layers, kinds = compiled.manifest["layers"], compiled.manifest["kinds"]
    errors = {error.layer: error for error in result.layers}
    names = [layer["name"] for layer in layers]
    rows = [["layer", "inputs x functions", "outputs", "bits", "rows", "bytes", "SQNR dB", "worst dB", "kernel"]]
    for layer in layers:
        kernels = [
            f"{kernel['operator']}{'' if kernel['is_integer'] else ' (float)'}"
            for kernel in kernels_of(layer["name"], names, compiled.audit)
        ]
        tables = sum(entry.get("table_bytes", 0) for entry in layer["expansions"])
        error = errors.get(layer["name"])
        rows.append(
            [
                layer["name"] + (f" ({kinds[layer['name']]})" if layer["name"] in kinds else ""),
                " + ".join(map(functions_text, layer["expansions"])),
                str(layer["n_out"]),
                str(layer["weight_bits"]),
                " + ".join(dict.fromkeys(_levels(entry) for entry in layer["expansions"])),
                f"{layer['weight_bytes'] + tables:,}",
                "" if error is None else f"{error.sqnr_db:.2f}",
                "" if error is None or error.worst is None else f"{error.worst.sqnr_db:.2f}",
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


def _sizes(program: Program) -> list[str]:
    """Say the sizes that a file takes where there is more to say than a number of features."""
    inputs = program.interface.inputs
    if len(inputs) == 1 and len(inputs[0].shape) < 2 and not inputs[0].dynamic:
        return []
    fixed = [entry for entry in inputs if len(entry.dynamic) < len(entry.shape)]
    rest = "; fixed sizes are those of the samples, --dynamic leaves some open" if fixed else ""
    return [f"takes {', '.join(entry.text() for entry in inputs)}{rest}"]


def _warnings(compiled: CompiledModel, result: Validation, beside: BesideFloat | None) -> list[tuple[str, str]]:
    manifest = compiled.manifest
    found = [("missed", reason) for reason in result.reasons]
    # a layer that was not rounded is meant to be float
    integer = {layer["name"] for layer in manifest["layers"] if not computes_in_float(layer)}
    float_rows = [row for row in compiled.audit.rows if not row.is_integer]
    found += [
        ("warning", f"{row.node} runs as float {row.operator}")
        for row in float_rows
        if any(row.node.startswith(f"{name}/") for name in integer)
    ]
    found += [
        ("warning", f"{name}: constant dequantized at every call") for name in compiled.audit.dequantized_constants
    ]
    refined = [note for note in manifest["notes"] if note.startswith(_REFINED)]
    found += [("warning" if _WIDENED in note else "note", note) for note in refined]
    found += [("warning", note) for note in manifest["notes"] if note.startswith(_OF_THE_DATA)]
    found += [("note", note) for note in manifest["notes"] if note.startswith(_OF_THE_MODEL)]
    found += [("note", note) for note in manifest["notes"] if any(text in note for text in _OF_JOINT_LOOKUPS)]
    found += [("note", float_text(part)) for part in manifest["left_in_float"]]
    found += [("note", _not_a_layer(*part)) for part in not_layers(manifest["unrecognized"], manifest["left_in_float"])]
    found += [("note", text) for text in manifest["calibration"]["notes"]]
    found += [("note", text) for text in result.notes]
    found += [("note", text) for text in (() if beside is None else beside.notes)]
    found += [("warning", text) for text in ([] if beside is None else worse_than_float(manifest, beside))]
    wide = needs_int16(manifest, compiled.lowered.input_shape, result)
    found += [] if wide is None else [("note", wide)]
    missed = goal_missed(manifest, result)
    found += [] if missed is None else [("warning", missed)]  # the last line, which is what is read
    return list(dict.fromkeys(found))


def _not_a_layer(name: str, place: str, reason: str, count: int) -> str:
    return f"not a KAN layer: {f'{count} x ' if count > 1 else ''}{name} ({reason}) {place}".rstrip()
