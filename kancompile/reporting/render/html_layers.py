"""The sections of a report page about layers: two tables, and the map of weight errors."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kancompile.reporting.facts import functions_text
from kancompile.reporting.render.html_parts import MISSING, data_size, decibels, number, percent, table
from kancompile.reporting.render.plots import error_map

_MAPS = 12


def layer_tables(report: Mapping[str, Any]) -> str:
    """Say of every layer and branch what it costs and how exact it is; then what it receives and why it is safe."""
    return (
        "<p>SQNR of a layer counts the errors of the layers before it; that of a branch is its own. The share is of the "
        "error at the model's output when only this layer, or this branch, is compiled and all else computes in float.</p>"
        f"{_errors(report)}"
        "<p>Inputs beyond the first and last row of a table use that row. Dead columns are functions of one input that never "
        "change on the calibration data, or whose weights are all 0. Sums are the largest that any input could cause, "
        "in percent of 2<sup>31</sup>.</p>"
        f"{_ranges(report)}"
    )


def _errors(report: Mapping[str, Any]) -> str:
    head = [
        "layer, branch",
        "precision",
        "bits",
        "rows",
        "weights",
        "tables",
        "SQNR",
        "share of error",
        "alone",
        "kernel",
    ]
    rows, classes = [], []
    for layer in report["layers"]:
        kernels = ", ".join(dict.fromkeys(k["operator"] for k in layer["kernels"])) or "float operators"
        levels = " + ".join(dict.fromkeys(number_of_levels(e["levels"]) for e in layer["expansions"]))
        rows.append(
            [
                f"<b>{escape(layer['name'])}</b>",
                layer["precision"],
                str(layer["weight_bits"]),
                levels,
                data_size(layer["weight_bytes"]),
                data_size(layer["table_bytes"]),
                decibels(layer["sqnr_db"]),
                *_alone(layer["alone"]),
                escape(kernels),
            ]
        )
        classes.append("")
        for branch in layer["branches"] if len(layer["branches"]) > 1 else []:
            rows.append(
                [
                    branch_name(branch),
                    "",
                    str(branch["weight_bits"]),
                    number_of_levels(branch["levels"]),
                    data_size(branch["weight_bytes"]),
                    data_size(branch["table_bytes"]),
                    decibels(branch["sqnr_db"]),
                    *_alone(branch["alone"]),
                    "",
                ]
            )
            classes.append("branch")
    return table(head, rows, classes)


def _alone(alone: Mapping[str, Any] | None) -> list[str]:
    if alone is None:
        return [MISSING, MISSING]
    width = min(1.0, max(0.0, alone["noise_share"]))
    return [
        f'<span class="bar" style="width:{4 * width:.2f}rem"></span>{percent(alone["noise_share"])}',
        decibels(alone["sqnr_db"]),
    ]


def _ranges(report: Mapping[str, Any]) -> str:
    head = [
        "layer, branch",
        "functions",
        "table range",
        "inputs seen",
        "outside",
        "dead columns",
        "int16 pairs",
        "int32 sums",
    ]
    rows, classes = [], []
    for layer in report["layers"]:
        ranges = [(_range(e["low"], e["high"]), _seen(e), _outside(e)) for e in layer["expansions"]]
        joined = ["<br>".join(part) for part in zip(*ranges, strict=True)]
        functions = " + ".join(map(functions_text, layer["expansions"]))
        dead = sum(branch["dead"]["either"] for branch in layer["branches"])
        columns = sum(branch["columns"] for branch in layer["branches"])
        row = [
            f"<b>{escape(layer['name'])}</b>",
            f"{functions} \N{RIGHTWARDS ARROW} {layer['n_out']}",
            *joined,
            f"{dead:,} of {columns:,}",
            _pairs(layer["int16_pairs"]),
            _sums(layer["int32_sums"]),
        ]
        rows.append(row)
        classes.append("")
        for branch in layer["branches"] if len(layer["branches"]) > 1 else []:
            dead_text = f"{branch['dead']['either']:,} of {branch['columns']:,}"
            outside = percent(branch["outside_share"])
            rows.append([branch_name(branch), f"{branch['k']} of each input", "", "", outside, dead_text, "", ""])
            classes.append("branch")
    return table(head, rows, classes)


def branch_name(branch: Mapping[str, Any]) -> str:
    """Say what a branch is; how the graph calls it shows where the pointer rests, or where nothing else is known."""
    name = escape(branch["name"])
    return f'<span title="{name}">{escape(branch["meaning"])}</span>' if branch["meaning"] else f"<code>{name}</code>"


def number_of_levels(levels: int | None) -> str:
    """Format a count of table rows."""
    return MISSING if levels is None else f"{levels:,}"


def _range(low: float | None, high: float | None) -> str:
    return MISSING if low is None else f"{number(low)} \N{HORIZONTAL ELLIPSIS} {number(high)}"


def _seen(expansion: Mapping[str, Any]) -> str:
    outside = expansion["outside"]
    return MISSING if outside is None else _range(outside["smallest"], outside["largest"])


def _outside(expansion: Mapping[str, Any]) -> str:
    outside = expansion["outside"]
    if outside is None:
        return MISSING
    worst = (
        ""
        if outside["worst_input"] is None
        else f'<br><span class="soft">input {outside["worst_input"]}: {percent(outside["worst_share"])}</span>'
    )
    return f"{percent(outside['share'])}{worst}"


def _pairs(proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return MISSING
    if proof["exact"]:
        return f"proved, \N{LESS-THAN OR EQUAL TO} {proof['largest']:,}"
    return f"<b>{proof['overflowing']:,} of {proof['pairs']:,} overflow</b>"


def _sums(sums: Mapping[str, Any] | None) -> str:
    if sums is None:
        return MISSING
    return f"\N{LESS-THAN OR EQUAL TO} {percent(sums['largest'] / sums['limit'])}"


def weight_maps(report: Mapping[str, Any]) -> str:
    """Draw the maps of the layers that bring most of the error."""
    mapped = [layer for layer in report["layers"] if layer["weight_errors"] is not None]
    by_share = sorted(mapped, key=lambda layer: -(layer["alone"] or {"noise_share": 0.0})["noise_share"])
    shown = [layer for layer in mapped if layer in by_share[:_MAPS]]
    if not shown:
        return "<p>No layer kept its functions, so that rounded weights have no twins to compare them with.</p>"
    figures = "".join(
        f"<figure><figcaption><b>{escape(layer['name'])}</b> "
        f'<span class="soft">{layer["weight_bits"]} bits, {percent(layer["weight_errors"]["relative"])} in all</span>'
        f"</figcaption>{error_map(layer['weight_errors'])}</figure>"
        for layer in shown
    )
    left = len(mapped) - len(shown)
    more = f" {left} layers with less error are in the JSON file." if left else ""
    return (
        "<p>Root mean square over the functions of an edge, relative to that of all weights of the layer, both as they are "
        f'rounded, scales of table columns included.{more}</p><div class="plots">{figures}</div>'
    )
