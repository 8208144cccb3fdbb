"""Draw an edge function on axes of matplotlib, in given colors: a page's own, or those of a paper."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kancompile.errors import KanCompileError
from kancompile.validation.edge_functions.curves import Edge

_SIZE = 6.8, 2.6


@dataclass(frozen=True)
class Palette:
    """Colors by what they stand for, as matplotlib takes them.

    Attributes:
        ink, faint: text, and what stands back.
        exact, table, compiled: the float function, the same weights on table values, the integers of the file.
        bars: the histogram behind them.
    """

    ink: str
    faint: str
    exact: str
    table: str
    compiled: str
    bars: str


def draw_edge(axes: Any, edge: Mapping[str, Any], palette: Palette) -> None:
    """Draw one edge function: float, on the table, as compiled, over the histogram of calibration inputs."""
    bars = axes.twinx()
    bins, counts = edge["histogram"]["bins"], edge["histogram"]["counts"]
    bars.stairs(counts, bins, fill=True, color=palette.bars)
    bars.set_ylim(0, max(1, *counts) * 2.8)  # below the curves
    bars.set_axis_off()
    axes.set_zorder(bars.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(edge["x"], edge["float"], color=palette.exact, linewidth=2.6, label="float")
    if edge["table"] is not None:
        axes.plot(edge["x"], edge["table"], color=palette.table, linewidth=1.1, label="lookup table, float weights")
    dashes = (0, (4, 2))
    axes.plot(edge["x"], edge["compiled"], color=palette.compiled, linewidth=1.1, linestyle=dashes, label="compiled")
    axes.set_xlabel("input of the edge")
    axes.margins(x=0)


# Okabe and Ito (2008): colors that differ for color-blind readers
PAPER = Palette("#000000", "#999999", "#0072B2", "#009E73", "#D55E00", "#E6E6E6")


def plot(edge: Edge, axes: Any = None) -> Any:
    """Draw an edge with a title and a legend.

    Args:
        edge: its curves.
        axes: of matplotlib; ``None`` for those of a new figure.

    Returns:
        the axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    curves = {"x": edge.x, "float": edge.exact, "table": edge.table, "compiled": edge.compiled}
    histogram = {"bins": edge.bins.tolist(), "counts": edge.counts.tolist()}
    draw_edge(axes, curves | {"histogram": histogram}, PAPER)
    name = edge.name
    axes.set_title(f"{name.layer}: input {name.input} to output {name.output}, {edge.sqnr_db:.0f} dB")
    axes.legend()
    return axes


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
