"""Draw the board: points lost by bits for each family, by bytes, and by time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.board.cells import AFTER, NETWORKS, Cell
from benchmarks.board.networks import title

_BITS = (8, 4, 3, 2)
Results = Mapping[str, Mapping[str, Any]]


def draw(results: Results, file: Path) -> None:
    """Write an SVG; equal results give equal bytes."""
    with mpl.rc_context({"svg.hashsalt": "kancompile", "svg.fonttype": "path", "axes.spines.top": False}):
        figure(results).savefig(file, metadata={"Date": None})


def figure(results: Results) -> Figure:
    """Draw the best method after training of every network, index bits of 8."""
    drawn = Figure(figsize=(11.5, 3.8), layout="constrained")
    by_bits, by_bytes, by_time = drawn.subplots(1, 3, sharey=True)
    for network in NETWORKS:
        best = [(bits, found) for bits in _BITS if (found := _best(results, network, bits)) is not None]
        if not best:
            continue
        lost = [found["lost"] for _, found in best]
        by_bits.plot([_BITS.index(bits) for bits, _ in best], lost, marker="o", label=title(network))
        by_bytes.plot([found["bytes"] / found["float_bytes"] for _, found in best], lost, marker="o")
        by_time.plot([found["time"] for _, found in best], lost, marker="o")
    by_bits.set_xticks(range(len(_BITS)), [str(bits) for bits in _BITS])
    by_bits.set_xlabel("bits of the weights, best method after training")
    by_bits.set_ylabel("points of accuracy lost")
    by_bytes.set_xlabel("bytes, as a share of the float export's")
    by_time.set_xlabel("time at batch 32, as a share of the float export's")
    for axes in (by_bits, by_bytes, by_time):
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=0.5)
    for axes in (by_bytes, by_time):
        axes.set_xscale("log")
    drawn.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return drawn


def _best(results: Results, network: str, bits: int) -> dict[str, float] | None:
    """Average the cells of every method over seeds, and give those of the one that loses least."""
    averages = []
    for method in AFTER:
        cells = [Cell(network, method, bits, 8, seed).key for seed in range(3)]
        found = [results[key] for key in cells if key in results]
        if found:
            columns: dict[str, list[float]] = {key: [r[key] for r in found] for key in ("lost", "bytes", "float_bytes")}
            columns["time"] = [1 / r["times_as_fast_as_float"]["32"] for r in found]
            averages.append({key: statistics.mean(values) for key, values in columns.items()})
    return min(averages, key=lambda average: average["lost"]) if averages else None
