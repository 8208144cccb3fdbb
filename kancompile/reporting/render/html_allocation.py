"""The section of a report page that shows the Pareto front of an allocation: bytes, microseconds and error."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kancompile.reporting.render.html_parts import MISSING, data_size, decibels, table
from kancompile.reporting.render.plots import allocation_plot


def allocation_section(allocation: Mapping[str, Any]) -> str:
    """Render what :func:`kancompile.reporting.facts.allocation_front` gives."""
    points, has_times = allocation["points"], has_microseconds(allocation)
    head = ["what layers got", "bytes", "predicted", "worst output", "predicted"]
    head += ["microseconds", "predicted"] if has_times else []
    rows = []
    for point in points:
        label = escape(point["text"]) + (" <b>(this file)</b>" if point["chosen"] else "")
        row = [label, data_size(point["bytes"]), _size(point["predicted_bytes"])]
        row += [decibels(point["measured_db"]), decibels(point["predicted_db"])]
        row += [_time(point["measured_us"]), _time(point["predicted_us"])] if has_times else []
        rows.append(row)
    axes = ["bytes", *(["us"] if has_times else [])]
    plots = "".join(f"<figure>{allocation_plot(allocation, axis)}</figure>" for axis in axes)
    times = (
        " Microseconds are of a call in one thread on the machine that compiled it; by the profile's costs, not by these, the "
        "file was chosen."
        if has_times
        else ""
    )
    return (
        "<p>The line is the Pareto front that single layers, lowered alone, predict; filled points were compiled and measured, "
        f"each tied to its prediction, the largest is this file.{times}</p>"
        f'<div class="plots">{plots}</div>{table(head, rows, wrap=(0,))}'
    )


def has_microseconds(allocation: Mapping[str, Any]) -> bool:
    """Whether times were predicted."""
    return any(point["us"] is not None for point in allocation["front"])


def _size(value: int | None) -> str:
    return MISSING if value is None else data_size(value)


def _time(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"
