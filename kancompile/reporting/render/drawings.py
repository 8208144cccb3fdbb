"""What reports draw, on axes of matplotlib and in given colors: a page's own, or those of a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kancompile.validation import Palette


def draw_front(
    axes: Any, points: Sequence[Mapping[str, Any]], metric: str, baseline: float | None, palette: Palette
) -> None:
    """Draw accuracy with its intervals, and on the right axis SQNR, against bytes of weights; SQNR alone without labels."""
    has_metric = all(isinstance(point["metric"], int | float) for point in points)
    key = "metric" if has_metric else "sqnr_db"
    shown = [point for point in points if isinstance(point[key], int | float)]
    kilobytes = [point["weight_bytes"] / 1000 for point in shown]
    if has_metric:
        _draw_ratios(axes.twinx(), points, palette)
    axes.plot(kilobytes, [point[key] for point in shown], color=palette.faint, linewidth=1)
    for point, size in zip(shown, kilobytes, strict=True):
        color = palette.compiled if point["shipped"] else palette.exact
        if has_metric and point["interval"] is not None:
            axes.vlines(size, *point["interval"], color=color, linewidth=1)
        axes.plot([size], [point[key]], "o", color=color, markersize=9 if point["shipped"] else 6)
        # away from the line of the float model
        above = 8 if not has_metric or baseline is None or point[key] > baseline else -17
        axes.annotate(bits_text(point["bits"]), (size, point[key]), (6, above), textcoords="offset points", ha="left")
    if has_metric and baseline is not None:
        axes.axhline(baseline, color=palette.table, linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate("float", (0, baseline), (2, 4), xycoords=("axes fraction", "data"), textcoords="offset points")
    axes.set_xlabel("weights in kB")
    axes.set_ylabel(f"{metric}{'' if metric == 'R2' else ' in %'}" if has_metric else "SQNR of the output in dB")
    axes.margins(0.2, 0.2)


def draw_allocation(axes: Any, allocation: Mapping[str, Any], key: str, palette: Palette) -> None:
    """Draw the predicted front of an allocation, and its measured points, each tied to its prediction.

    Args:
        axes: of matplotlib.
        allocation: as :func:`kancompile.reporting.facts.allocation_front` gives it.
        key: ``"bytes"`` or ``"us"``, what errors are drawn against.
        palette: colors.
    """
    unit = 1000.0 if key == "bytes" else 1.0
    line = sorted(
        (one[key] / unit, one["db"])
        for one in allocation["front"]
        if isinstance(one[key], int | float) and isinstance(one["db"], int | float)
    )
    best: list[tuple[float, float]] = []
    for size, ratio in line:  # what takes more and is no better lies on the front of the other axis
        if not best or ratio > best[-1][1]:
            best.append((size, ratio))
    axes.plot([size for size, _ in best], [ratio for _, ratio in best], "-", color=palette.faint, linewidth=1)
    axes.plot([size for size, _ in line], [ratio for _, ratio in line], ".", color=palette.faint)
    measured, predicted = ("bytes", "predicted_bytes") if key == "bytes" else ("measured_us", "predicted_us")
    for point in allocation["points"]:
        found = (point[measured], point["measured_db"])
        if not all(isinstance(value, int | float) for value in found):
            continue
        color = palette.compiled if point["chosen"] else palette.exact
        size, ratio = found[0] / unit, found[1]
        guess = (point[predicted], point["predicted_db"])
        if all(isinstance(value, int | float) for value in guess):
            axes.plot([guess[0] / unit, size], [guess[1], ratio], color=color, linewidth=0.8)
            axes.plot([guess[0] / unit], [guess[1]], "o", color=color, markersize=5, fillstyle="none")
        axes.plot([size], [ratio], "o", color=color, markersize=9 if point["chosen"] else 5)
    axes.set_xlabel("file in kB" if key == "bytes" else "microseconds of a call")
    axes.set_ylabel("SQNR of the worst output in dB")
    axes.margins(0.1, 0.1)


def _draw_ratios(axes: Any, points: Sequence[Mapping[str, Any]], palette: Palette) -> None:
    known = [point for point in points if isinstance(point["sqnr_db"], int | float)]
    sizes = [point["weight_bytes"] / 1000 for point in known]
    axes.plot(sizes, [point["sqnr_db"] for point in known], ":", color=palette.table, linewidth=1.2)
    axes.set_ylabel("SQNR in dB (dotted)")
    axes.spines.right.set_visible(True)
    axes.margins(0.2, 0.2)


def draw_error_map(axes: Any, errors: Mapping[str, Any]) -> None:
    """Draw the relative rounding error of a layer's weights, outputs down and inputs to the right."""
    import numpy as np

    values = 100 * np.asarray(errors["values"])
    extent = (0, errors["n_in"], errors["n_out"], 0)
    top = float(np.percentile(values, 99)) or 1.0
    image = axes.imshow(values, aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("error in %")
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    axes.spines[:].set_visible(False)


def draw_contributions(axes: Any, layers: Sequence[Mapping[str, Any]], palette: Palette) -> None:
    """Draw which share of the output's error each layer brings, the first layer at the top."""
    measured = [layer for layer in layers if layer["alone"] is not None]
    shares = [100 * float(layer["alone"]["noise_share"]) for layer in measured]
    places = range(len(measured))
    axes.barh(places, shares, color=palette.exact)
    axes.set_yticks(places, [layer["name"] for layer in measured])
    axes.invert_yaxis()
    for place, layer, share in zip(places, measured, shares, strict=True):
        bits = "" if layer["weight_bits"] is None else f"{layer['weight_bits']} bits, "
        axes.annotate(f"{bits}{share:.0f} %", (share, place), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.25)
    axes.set_xlabel("share of the error at the output in %")


def bits_text(bits: Mapping[str, int]) -> str:
    """Name an assignment of bits shortly: ``4`` where all layers have as many, else the range."""
    widths = sorted(set(bits.values()))
    if not widths:
        return ""
    return f"{widths[0]} bit" if len(widths) == 1 else f"{widths[0]}-{widths[-1]} bit"
