"""Draw the plots of a report with matplotlib, as inline SVG whose colours are those of the page.

Text stays text, so that the page's font and its light and dark colours apply, and bytes depend on the data alone.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kancompile.errors import KanCompileError

# drawn in colours that nothing else has, which then become those of the page
_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--faint)",
    "#010205": "var(--float)",
    "#010206": "var(--table)",
    "#010207": "var(--compiled)",
    "#010208": "var(--bars)",
}
_INK, _FAINT, _FLOAT, _TABLE, _COMPILED, _BARS = _COLOURS
_WIDTH = 4.4
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kancompile",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "path.simplify": True,
}
_FONT = re.compile(r"font: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*")
_DIGITS = re.compile(r"(-?\d+\.\d\d)\d+")
_PATH = re.compile(r' (?:d|points)="[^"]*"')


def check_matplotlib(who: str = "report", way_out: str = "") -> None:
    """Make sure, before any work is done, that plots can be drawn.

    Args:
        who: needs them.
        way_out: another than to install it.

    Raises:
        KanCompileError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KanCompileError(
            f"{who}: found no matplotlib, which draws the plots; install it: pip install 'kancompile[plots]'{way_out}"
        )


def edge_plot(edge: Mapping[str, Any]) -> str:
    """Draw one edge function: float, on the table, as compiled, over the histogram of calibration inputs."""
    with _figure(2.7) as (figure, svg):
        axes = figure.add_subplot()
        bars = axes.twinx()
        bins, counts = edge["histogram"]["bins"], edge["histogram"]["counts"]
        bars.stairs(counts, bins, fill=True, color=_BARS)
        bars.set_ylim(0, max(1, *counts) * 2.8)  # below the curves
        bars.set_axis_off()
        axes.set_zorder(bars.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.plot(edge["x"], edge["float"], color=_FLOAT, linewidth=2.6)
        if edge["table"] is not None:
            axes.plot(edge["x"], edge["table"], color=_TABLE, linewidth=1.1)
        axes.plot(edge["x"], edge["compiled"], color=_COMPILED, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.set_xlabel("input of the edge")
        axes.margins(x=0)
    return svg()


def front_plot(points: Sequence[Mapping[str, Any]], metric: str, baseline: float | None) -> str:
    """Draw accuracy (or the signal-to-noise ratio, where accuracy is unknown) against the bytes of the weights."""
    key = "metric" if all(isinstance(point["metric"], int | float) for point in points) else "sqnr_db"
    shown = [point for point in points if isinstance(point[key], int | float)]
    with _figure(2.9) as (figure, svg):
        axes = figure.add_subplot()
        kilobytes = [point["weight_bytes"] / 1000 for point in shown]
        axes.plot(kilobytes, [point[key] for point in shown], color=_FAINT, linewidth=1)
        for point, size in zip(shown, kilobytes, strict=True):
            colour = _COMPILED if point["shipped"] else _FLOAT
            axes.plot([size], [point[key]], "o", color=colour, markersize=9 if point["shipped"] else 6)
            # away from the line of the float model
            above = 8 if key != "metric" or baseline is None or point[key] > baseline else -17
            axes.annotate(
                bits_text(point["bits"]), (size, point[key]), (0, above), textcoords="offset points", ha="center"
            )
        if key == "metric" and baseline is not None:
            axes.axhline(baseline, color=_TABLE, linewidth=1, linestyle=(0, (4, 2)))
            axes.annotate(
                "float", (0, baseline), (2, 4), xycoords=("axes fraction", "data"), textcoords="offset points"
            )
        axes.set_xlabel("weights in kB")
        axes.set_ylabel(f"{metric} in %" if key == "metric" else "SQNR of the output in dB")
        axes.margins(0.12, 0.2)
    return svg()


def error_map(errors: Mapping[str, Any]) -> str:
    """Draw the relative rounding error of a layer's weights, outputs down and inputs to the right."""
    import numpy as np

    values = 100 * np.asarray(errors["values"])
    height = min(2.8, max(1.3, 0.9 + 3.2 * values.shape[0] / max(1, values.shape[1])))
    with _figure(height) as (figure, svg):
        axes = figure.add_subplot()
        extent = (0, errors["n_in"], errors["n_out"], 0)
        top = float(np.percentile(values, 99)) or 1.0
        image = axes.imshow(
            values, aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=top, interpolation="nearest"
        )
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("error in %")
        axes.set_xlabel("input")
        axes.set_ylabel("output")
        axes.spines[:].set_visible(False)
    return svg()


def bits_text(bits: Mapping[str, int]) -> str:
    """Name an assignment of bits shortly: ``4`` where all layers have as many, else the range."""
    widths = sorted(set(bits.values()))
    if not widths:
        return ""
    return f"{widths[0]} bit" if len(widths) == 1 else f"{widths[0]}-{widths[-1]} bit"


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Give a figure of the common width, and a function that yields its SVG once it is drawn."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn: list[str] = []
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        yield figure, lambda: drawn[0]
        for axes in figure.axes:
            axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        drawn.append(_inline(buffer.getvalue()))


def _inline(text: str) -> str:
    """Take the bare ``<svg>`` out of a file, with the page's colours and font, and no more digits than pixels show."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1, flags=re.DOTALL)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = _FONT.sub(r"font-size: \1px", svg)
    svg = _PATH.sub(lambda found: _DIGITS.sub(r"\1", found.group()), svg)
    # the style element would hold for the whole page, and needs none there
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", " ", svg).strip()
