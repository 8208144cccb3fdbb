"""Which method for which family and bits: the quickest one that is nearly as good as the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.board.cells import AFTER, BITS_AFTER, Cell, bits_text
from benchmarks.board.networks import title

NEARLY = 0.1
"""Points by which a method may stay behind the best one."""
_FROM_QUICK_TO_SLOW = ("uniform", "gptq", "awq+gptq", "hawq-v2", "adaround", "brecq")
Results = Mapping[str, Mapping[str, Any]]


def advice(results: Results) -> str:
    """Write a table of families by bits, from the cells of all networks and seeds for which every method was run."""
    columns = [bits_text(*bits) for bits in BITS_AFTER]
    found: dict[str, list[str]] = {}
    for family in dict.fromkeys(_family(Cell(**result["cell"]).network) for result in results.values()):
        cells = [_advised(results, family, bits) for bits in columns]
        if any(cells):
            found[family] = [cell or "not run" for cell in cells]
    if not found:
        return "not run."
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {family} | {' | '.join(cells)} |" for family, cells in sorted(found.items()))])


def _family(network: str) -> str:
    return title(network).partition(",")[0]


def _advised(results: Results, family: str, bits: str) -> str | None:
    """Give the quickest method of little loss, its mean points lost, and the best one where that is another."""
    lost: dict[tuple[str, int], dict[str, float]] = {}
    for result in results.values():
        cell = Cell(**result["cell"])
        if _family(cell.network) == family and cell.bits == bits and cell.samples == Cell.samples:
            lost.setdefault((cell.network, cell.seed), {})[cell.method] = result["lost"]
    whole = [methods for methods in lost.values() if set(AFTER) <= set(methods)]
    if not whole:
        return None
    mean = {method: statistics.mean(methods[method] for methods in whole) for method in _FROM_QUICK_TO_SLOW}
    best = min(_FROM_QUICK_TO_SLOW, key=lambda method: mean[method])
    advised = next(method for method in _FROM_QUICK_TO_SLOW if mean[method] <= mean[best] + NEARLY)
    other = "" if advised == best else f"; best `{best}` {mean[best]:.2f}"
    return f"`{advised}` {mean[advised]:.2f}{other} ({len(whole)})"
