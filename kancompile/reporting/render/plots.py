"""Draw the plots of a report with matplotlib, as inline SVG whose colors are those of the page.

Text stays text, so that the page's font and its light and dark colors apply, and bytes depend on the data alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kancompile.reporting.render.drawings import draw_allocation, draw_error_map, draw_front
from kancompile.validation import Palette, draw_edge

# drawn in colors that nothing else has, which then become those of the page
_COLOURS = {
    "#010203": "var(--ink)",
    "#010204": "var(--faint)",
    "#010205": "var(--float)",
    "#010206": "var(--table)",
    "#010207": "var(--compiled)",
    "#010208": "var(--bars)",
}
PAGE = Palette(*_COLOURS)
_INK, _FAINT = PAGE.ink, PAGE.faint
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


def edge_plot(edge: Mapping[str, Any]) -> str:
    """Draw one edge function: float, on the table, as compiled, over the histogram of calibration inputs."""
    with _figure(2.7) as (figure, svg):
        draw_edge(figure.add_subplot(), edge, PAGE)
    return svg()


def front_plot(points: Sequence[Mapping[str, Any]], metric: str, baseline: float | None) -> str:
    """Draw accuracy with its intervals, where it is known, and the signal-to-noise ratio against the bytes of the weights."""
    with _figure(2.9) as (figure, svg):
        draw_front(figure.add_subplot(), points, metric, baseline, PAGE)
    return svg()


def allocation_plot(allocation: Mapping[str, Any], key: str) -> str:
    """Draw the front of an allocation and its measured points against ``"bytes"`` or ``"us"``."""
    with _figure(2.9) as (figure, svg):
        draw_allocation(figure.add_subplot(), allocation, key, PAGE)
    return svg()


def error_map(errors: Mapping[str, Any]) -> str:
    """Draw the relative rounding error of a layer's weights, outputs down and inputs to the right."""
    rows, columns = (len(errors["values"]), len(errors["values"][0]) if errors["values"] else 1)
    with _figure(min(2.8, max(1.3, 0.9 + 3.2 * rows / max(1, columns)))) as (figure, svg):
        draw_error_map(figure.add_subplot(), errors)
    return svg()


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
    """Take the bare ``<svg>`` out of a file, with the page's colors and font, and no more digits than pixels show."""
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
