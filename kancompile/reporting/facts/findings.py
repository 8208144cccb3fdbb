"""Say what a reader should know before anything else, in order of weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kancompile.reporting.facts.branch_meaning import CONSTANT, MIXTURES
from kancompile.reporting.facts.layer_kinds import float_text, not_layers
from kancompile.validation import RUINED_DB

SEVERITIES = ("serious", "warning", "note")

_SERIOUS_DROP, _NOTABLE_DROP = 1.0, 0.3  # points
_SERIOUS_SQNR, _NOTABLE_SQNR = 10.0, 20.0  # dB
_SERIOUS_OUTSIDE, _NOTABLE_OUTSIDE = 0.05, 0.005
_NOTABLE_DEAD = 0.25
_FEW_SAMPLES = 64
_AGREEMENT = 40.0  # dB, of ONNX Runtime with the simulation


def findings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Collect them from a report that is complete but for this list; equal weight keeps the order of evaluation.

    Returns:
        each with ``severity``, ``where`` and ``text``.
    """
    found = [*_overall(report), *_kernels(report)]
    for layer in report["layers"]:
        found += _of_layer(layer)
    found += _rest(report)
    found.sort(key=lambda entry: SEVERITIES.index(entry["severity"]))
    return found


def _say(severity: str, where: str, text: str) -> dict[str, str]:
    return {"severity": severity, "where": where, "text": text}


def _overall(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    summary = report["summary"]
    for reason in summary["reasons"]:
        yield _say("serious", "result", reason)
    task = summary["task"]
    drop = _number(task["drop"]) if task is not None else None
    if drop is not None and drop >= _NOTABLE_DROP:
        severity = "serious" if drop >= _SERIOUS_DROP else "warning"
        severity = "note" if task["paired"] is not None and task["paired"]["is_within_chance"] else severity
        yield _say(severity, "result", f"{task['name']} falls by {drop:.2f} points on {report['measured_on']}")
    runtime = summary["runtime"]
    agreement = _number(runtime["sqnr_db"])
    # integers agree bit for bit; float operators round otherwise in every runtime, and may move a code behind them
    if agreement is not None and agreement < _AGREEMENT:
        yield _say(
            "serious",
            "result",
            f"ONNX Runtime and the simulation differ in {runtime['differing']:,} of {runtime['count']:,} outputs, "
            f"{agreement:.1f} dB apart: the layers' figures are those of the simulation",
        )
    for text in summary["beside_float"]:
        yield _say("warning", "result", text)
    if summary["goal_missed"] is not None:
        ruined = (_number(summary["worst"]["sqnr_db"]) or 0.0) < RUINED_DB
        yield _say("serious" if ruined else "warning", "result", summary["goal_missed"])


def _kernels(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    integer = {layer["name"] for layer in report["layers"] if layer["precision"] == "int8"}
    for layer in report["layers"]:
        floats = [kernel["operator"] for kernel in layer["kernels"] if not kernel["is_integer"]]
        if layer["name"] in integer and floats:
            yield _say(
                "serious", layer["name"], f"runs as float {', '.join(floats)} although it was rounded to integers"
            )
    for name in report["kernels"]["dequantized_constants"]:
        yield _say("warning", name, "a constant is dequantized at every call")


def _of_layer(layer: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    name = layer["name"]
    proof = layer["int16_pairs"]
    if proof is not None and not proof["exact"]:
        yield _say(
            "warning",
            name,
            f"{proof['overflowing']:,} of {proof['pairs']:,} sums of two neighboring products can leave int16 (up to "
            f"{proof['largest']:,}): x86 processors without VNNI would saturate",
        )
    sums = layer["int32_sums"]
    if sums is not None and sums["largest"] > sums["limit"]:
        yield _say("serious", name, f"integer sums can reach {sums['largest']:,}, beyond int32")
    sqnr = _number(layer["sqnr_db"])
    if sqnr is not None and sqnr < _NOTABLE_SQNR:
        severity = "serious" if sqnr < _SERIOUS_SQNR else "warning"
        share = (
            ""
            if layer["alone"] is None
            else f"; alone it brings {100 * layer['alone']['noise_share']:.0f} % of the error"
        )
        yield _say(severity, name, f"its output is at {sqnr:.1f} dB{share}")
    for expansion in layer["expansions"]:
        outside = expansion["outside"]
        if outside is not None and outside["share"] >= _NOTABLE_OUTSIDE:
            severity = "serious" if outside["share"] >= _SERIOUS_OUTSIDE else "warning"
            yield _say(
                severity,
                name,
                f"{100 * outside['share']:.2g} % of its inputs lie outside its table ({expansion['low']:.4g} ... "
                f"{expansion['high']:.4g}; seen {outside['smallest']:.4g} ... {outside['largest']:.4g}), most of input "
                f"{outside['worst_input']}",
            )
    for branch in layer["branches"]:
        dead = branch["dead"]["either"]
        if branch["name"] == MIXTURES:  # the constant of each channel is there on purpose
            dead -= branch["columns"] // branch["k"]
        what = branch["meaning"] or f"branch {branch['name']!r}"
        if dead >= _NOTABLE_DEAD * branch["columns"] and branch["meaning"] != CONSTANT:
            yield _say(
                "note",
                name,
                f"{dead:,} of {branch['columns']:,} columns of {what} contribute nothing "
                f"({branch['dead']['constant']:,} constant on the calibration data, {branch['dead']['zero_weights']:,} "
                "with weights that are all 0)",
            )


def _rest(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for part in report["left_in_float"]:
        yield _say("note", "operators", float_text(part))
    for name, place, reason, count in not_layers(report["unrecognized"], report["left_in_float"]):
        where = f", {place}" if place else ""
        yield _say("note", "operators", f"no KAN layer: {f'{count} x ' if count > 1 else ''}{name}: {reason}{where}")
    for text in report["notes"]:
        if text.startswith("size:"):
            yield _say("warning", "size", text.removeprefix("size:").strip())
        if text.startswith("error gate:"):
            yield _say("warning", "error gate", text.removeprefix("error gate:").strip())
        if text.startswith("model:"):
            yield _say("note", "model", text.removeprefix("model:").strip())
    calibration = report["model"]["calibration"]
    if calibration["samples"] < _FEW_SAMPLES:
        yield _say("warning", "calibration", f"only {calibration['samples']} samples: ranges and roundings are guesses")
    for text in calibration["notes"]:
        yield _say("note", "calibration", text.removeprefix("calibration:").strip())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
