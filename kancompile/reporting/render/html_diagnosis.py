"""The section of a report page that says why a model is not better: ranked causes with their changes, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kancompile.reporting.render.html_layers import branch_name
from kancompile.reporting.render.html_parts import MISSING, decibels, number, percent, table
from kancompile.validation import Score

_PARTS = ("outside", "levels", "codes", "weights")


def diagnosis_section(diagnosis: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """Render what :meth:`kancompile.diagnosis.Diagnosis.to_dict` gives, with names of branches from a report's layers."""
    standing = [cause for cause in diagnosis["causes"] if cause["stands_out"]]
    others = [cause for cause in diagnosis["causes"] if not cause["stands_out"]]
    outcome, score = diagnosis["outcome"], diagnosis["outcome"]["score"]
    measured = f"SQNR {decibels(outcome['sqnr_db'])}, worst output {decibels(outcome['worst_db'])}"
    if score is not None and diagnosis["float_score"] is not None:
        before, after = (Score(outcome["metric"], value).text() for value in (diagnosis["float_score"], score))
        measured += f", {after} (float {before})"
    if outcome["paired"] is not None:
        low, high = outcome["paired"]["accuracy_interval"]
        measured += f", 95 % interval {low:.2f} \N{HORIZONTAL ELLIPSIS} {high:.2f}"
    parts = [f"<p>Measured on {escape(str(diagnosis['judged_on']))}: {escape(measured)}.</p>"]
    if standing:
        parts.append(f'<ol class="causes">{"".join(_cause(cause) for cause in standing)}</ol>')
    else:
        count = diagnosis["changes_measured"]
        tried = f"None of the {count} changes that were measured" if count else "No change"
        parts.append(
            f"<p>Nothing stands out. {tried} of the recipe brings much within 8-bit integers, and no fault of the data was "
            "found.</p>"
        )
    parts += [f'<p class="soft">{escape(str(note))}</p>' for note in diagnosis["notes"]]
    if others:
        rows = [
            [escape(cause["kind"]), _layers(cause), _change(cause), _predicted(cause["effect"]), _gain(cause["effect"])]
            for cause in others
        ]
        head = ["also measured", "layers", "change", "predicted", "measured"]
        parts.append(table(head, rows, wrap={2}))
    parts += [_sweeps(diagnosis["sensitivities"], layers), _anatomies(diagnosis["layers"])]
    return "".join(parts)


def _cause(cause: Mapping[str, Any]) -> str:
    effect = cause["effect"]
    return (
        f"<li><b>{escape(cause['kind'].capitalize())}</b> {escape(cause['title'])}"
        f"<br>{'Free change (no more bytes, no more time)' if cause['change']['is_free'] else 'Change'}: {_change(cause)}"
        f'<br><span class="soft">Predicted {_predicted(effect)}, measured {_measured(effect)}</span></li>'
    )


def _change(cause: Mapping[str, Any]) -> str:
    """Show advice as words, and what goes into a recipe or a command as code."""
    change = cause["change"]
    advice = str(change["advice"])
    options = str(change["text"]).removeprefix(advice).removeprefix("; ")
    shown = [escape(advice)] if advice else []
    shown += [f"<code>{escape(options)}</code>"] if options else []
    return "; ".join(shown) or MISSING


def _layers(cause: Mapping[str, Any]) -> str:
    return escape(", ".join(map(str, cause["layers"]))) or MISSING


def _predicted(effect: Mapping[str, Any]) -> str:
    found = [_signed(effect["predicted_db"], "dB", 1), _signed(effect["predicted_points"], "points", 1)]
    return ", ".join(part for part in found if part) or "nothing"


def _gain(effect: Mapping[str, Any]) -> str:
    found = [_signed(effect["measured_db"], "dB", 1), _signed(effect["measured_points"], "points", 2)]
    return ", ".join(part for part in found if part) or "nothing"


def _measured(effect: Mapping[str, Any]) -> str:
    before, after = effect["before"], effect["after"]
    if before is None or after is None:
        return _gain(effect)
    moved = f"{decibels(before['sqnr_db'])} \N{RIGHTWARDS ARROW} {decibels(after['sqnr_db'])}"
    return f"{_gain(effect)} ({moved})"


def _signed(value: Any, unit: str, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:+.{digits}f} {unit}" if isinstance(value, int | float) else f"{escape(str(value))} {unit}"


def _sweeps(sensitivities: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> str:
    if not sensitivities:
        return ""
    has_labels = any(entry["only_drop"] is not None for entry in sensitivities)
    head = ["quantized", "only this", "all but this"]
    if has_labels:
        head = ["quantized", "only this", "points lost", "all but this", "points lost"]
    branches = {(layer["name"], branch["name"]): branch for layer in layers for branch in layer["branches"]}
    rows, classes = [], []
    for entry in sensitivities:
        layer, name = str(entry["layer"]), entry["branch"]
        branch = branches.get((layer, name), {"name": str(name), "meaning": ""})
        cells = [escape(layer) if name is None else branch_name(branch)]
        for way in ("only", "without"):
            cells.append(decibels(entry[f"{way}_sqnr_db"]))
            if has_labels:
                drop = entry[f"{way}_drop"]
                cells.append(f"{drop:.2f}" if isinstance(drop, int | float) else number(drop))
        rows.append(cells)
        classes.append("" if entry["branch"] is None else "branch")
    return f"<h3>Sensitivity: what the output keeps</h3>{table(head, rows, classes)}"


def _anatomies(layers: Sequence[Mapping[str, Any]]) -> str:
    """Divide the error of every integer layer into its parts."""
    if not layers:
        return ""
    rows = []
    for layer in layers:
        total = sum(float(layer[part]) for part in _PARTS)
        shares = [percent(float(layer[part]) / total if total > 0 else 0.0) for part in _PARTS]
        dead = f"{layer['dead_columns']:,} of {layer['columns']:,}"
        rows.append([escape(str(layer["layer"])), *shares, percent(layer["outside_share"]), dead])
    head = ["error of", "range", "rows", "8-bit codes", "weights", "inputs outside", "dead columns"]
    return f"<h3>What the error of each layer consists of</h3>{table(head, rows)}"
