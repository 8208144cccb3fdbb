"""Figures for papers: SVG, PDF and PNG by matplotlib, in colors that all readers tell apart; bytes depend on the data alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kancompile.reporting.render.drawings import draw_contributions, draw_error_map, draw_front
from kancompile.validation import PAPER, draw_edge, title

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
_COLUMNS = 3
FIGURES = ("layers", "edges", "front", "weights")
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


def figure_names() -> list[str]:
    """Name all files that :func:`report_figures` can write."""
    return [f"{name}.{kind}" for name in FIGURES for kind in FORMATS]


def report_figures(report: Mapping[str, Any], kinds: Sequence[str] = FORMATS) -> dict[str, bytes]:
    """Draw a report's figures, each in all formats.

    Args:
        report: as :func:`kancompile.reporting.collect` gives it.
        kinds: the formats.

    Returns:
        content by file name: ``layers`` (where the error comes from), ``edges`` (functions before and after), ``front`` (bits
        against accuracy) and ``weights`` (rounding errors), as far as the report has them.
    """
    drawn: dict[str, Callable[[Any], None]] = {}
    sizes: dict[str, tuple[float, float]] = {}
    layers, edges, points = report["layers"], report["edges"], report["bit_front"]["points"]
    mapped = [layer for layer in layers if layer["weight_errors"] is not None]
    if any(layer["alone"] is not None for layer in layers):
        drawn["layers"] = lambda figure: draw_contributions(figure.subplots(), layers, PAPER)
        sizes["layers"] = _WIDTH / 2, 0.8 + 0.22 * len(layers)
    if edges:
        drawn["edges"] = lambda figure: _edges(figure, edges)
        sizes["edges"] = _WIDTH, 1.7 * -(-len(edges) // _COLUMNS)
    if points:
        task, baseline = report["summary"]["task"], report["bit_front"]["float_metric"]
        metric = "accuracy" if task is None else title(task["name"])
        known = baseline if isinstance(baseline, int | float) else None
        drawn["front"] = lambda figure: draw_front(figure.subplots(), points, metric, known, PAPER)
        sizes["front"] = _WIDTH / 2, _HEIGHT
    if mapped:
        drawn["weights"] = lambda figure: _grid(figure, mapped, _weights)
        sizes["weights"] = _WIDTH, 1.9 * -(-len(mapped) // _COLUMNS)
    files: dict[str, bytes] = {}
    for name, draw in drawn.items():
        with _figure(*sizes[name]) as figure:
            draw(figure)
            files |= {f"{name}.{kind}": _saved(figure, kind) for kind in kinds}
    return files


def _grid(figure: Any, entries: Sequence[Mapping[str, Any]], draw: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """Draw small multiples, row by row."""
    columns = min(_COLUMNS, len(entries))
    places = figure.subplots(-(-len(entries) // columns), columns, squeeze=False).flatten()
    for axes, entry in zip(places, entries, strict=False):
        draw(axes, entry)
    for axes in places[len(entries) :]:
        axes.set_axis_off()


def _edges(figure: Any, edges: Sequence[Mapping[str, Any]]) -> None:
    _grid(figure, edges, _edge)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _edge(axes: Any, edge: Mapping[str, Any]) -> None:
    draw_edge(axes, edge, PAPER)
    axes.set_title(f"{edge['layer']}: {edge['input']} \N{RIGHTWARDS ARROW} {edge['output']}", fontsize=7)
    axes.set_xlabel("")


def _weights(axes: Any, layer: Mapping[str, Any]) -> None:
    draw_error_map(axes, layer["weight_errors"])
    axes.set_title(f"{layer['name']}: {layer['weight_bits']} bits", fontsize=7)


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
