"""Figures for papers: SVG, PDF and PNG by matplotlib, in colors that all readers tell apart; bytes depend on the data alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FORMATS = ("svg", "pdf", "png")
# Okabe and Ito (2008), whose colors differ for color-blind readers, and a marker each for readers of gray prints
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kancompile",
    "pdf.fonttype": 42,  # text stays text that can be searched and edited
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_WIDTH, _HEIGHT, _DPI = 6.8, 2.6, 300
_NO_DATES = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def comparison_figure(comparison: Mapping[str, Any], kind: str) -> bytes:
    """Draw a comparison: what is lost by bits (SQNR without labels), and SQNR by bytes, a line for each method.

    Args:
        comparison: ``Comparison.to_dict()``.
        kind: ``"svg"``, ``"pdf"`` or ``"png"``.
    """
    measured = [cell for cell in comparison["cells"] if isinstance(cell["sqnr_db"], int | float)]
    methods = list(dict.fromkeys(cell["method"] for cell in measured))
    widths = list(dict.fromkeys(str(cell["weight_bits"]) for cell in comparison["cells"]))
    widths.sort(key=lambda width: (width.isdecimal(), int(width) if width.isdecimal() else 0))
    has_score = comparison["float_score"] is not None
    with _figure() as figure:
        by_bits, by_bytes = figure.subplots(1, 2)
        for number, method in enumerate(methods):
            cells = [cell for cell in measured if cell["method"] == method]
            cells.sort(key=lambda cell: widths.index(str(cell["weight_bits"])))
            style = {
                "color": _COLORS[number % len(_COLORS)],
                "marker": _MARKERS[number % len(_MARKERS)],
                "markersize": 4,
                "linewidth": 1,
            }
            shift = 0.06 * (number - (len(methods) - 1) / 2)  # so that intervals do not hide each other
            places = [widths.index(str(cell["weight_bits"])) + shift for cell in cells]
            values = [cell["lost"] if has_score else cell["sqnr_db"] for cell in cells]
            by_bits.plot(places, values, label=method, **style)
            for place, cell in zip(places, cells, strict=True):
                if cell["lost_low"] is not None:
                    by_bits.vlines(place, cell["lost_low"], cell["lost_high"], color=style["color"], linewidth=0.8)
            kilobytes = [cell["file_bytes"] / 1000 for cell in cells]
            by_bytes.plot(kilobytes, [cell["sqnr_db"] for cell in cells], label=method, **style)
        if has_score:
            by_bits.axhline(0, color="#999999", linewidth=0.8, linestyle=(0, (4, 2)))
            by_bits.invert_yaxis()  # better is up, as beside it
        by_bits.set_xticks(range(len(widths)), widths)
        by_bits.set_xlabel("bits of a weight")
        metric = next((str(cell["metric"]) for cell in measured), "accuracy")
        lost = {"r2": "hundredths of R2 lost", "iou": "points of IoU lost"}.get(metric, f"points of {metric} lost")
        by_bits.set_ylabel(lost if has_score else "SQNR in dB")
        by_bytes.set_xlabel("file in kB")
        by_bytes.set_ylabel("SQNR in dB")
        by_bytes.legend()
        return _saved(figure, kind)


@contextmanager
def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_NO_DATES[kind])
    return buffer.getvalue()
