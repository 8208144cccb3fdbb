"""Check what the reference system published of its methods on the cells of the board."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.board.cells import AFTER, BITS_AFTER, PERCEPTRONS, WITH, Cell, bits_text

NEAR = 0.5
"""Points that a method may lose to be near full precision, or to be as good as the best one."""
Results = Mapping[str, Mapping[str, Any]]
Means = dict[tuple[str, str, str], float]
"""Mean points lost by network, method and bits."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the paper, and how it is judged.

    Attributes:
        text: the sentence.
        judge: gives ``None`` where no cells can tell, else whether it holds and the numbers that say so.
    """

    text: str
    judge: Callable[[Means], tuple[bool, str] | None]


def means(results: Results) -> Means:
    """Average the cells over their seeds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for result in results.values():
        cell = Cell(**result["cell"])
        found.setdefault((cell.network, cell.method, cell.bits), []).append(result["lost"])
    return {key: statistics.mean(values) for key, values in found.items()}


def findings(results: Results) -> str:
    """Write a table: the sentence, whether it holds here, the numbers."""
    averaged = means(results)
    lines = ["| published | here | numbers |", "|---|---|---|"]
    for finding in FINDINGS:
        judged = finding.judge(averaged)
        answer, numbers = ("not run", "") if judged is None else ("holds" if judged[0] else "does not hold", judged[1])
        lines.append(f"| {finding.text} | {answer} | {numbers} |")
    return "\n".join(lines)


def _near_full_precision(averaged: Means) -> tuple[bool, str] | None:
    methods = ("lsq", "lsq+", "pact")
    found = {method: _over(averaged, PERCEPTRONS, method, ("W4A4",)) for method in methods}
    if not all(found.values()):
        return None
    worst = {method: max(values) for method, values in found.items()}
    return all(value <= NEAR for value in worst.values()), _said(worst, "W4A4, worst network")


def _most_stable(averaged: Means) -> tuple[bool, str] | None:
    networks = ("cifar10_kagn", "cifar100_kagn")
    found = {method: _over(averaged, networks, method, ("W2A4", "W2A2")) for method in WITH}
    if not all(found.values()):
        return None
    worst = {method: max(values) for method, values in found.items()}
    return min(worst, key=worst.__getitem__) == "dorefa", _said(worst, "2 bits, worst cell")


def _strongest_after(averaged: Means) -> tuple[bool, str] | None:
    bits = tuple(bits_text(*bits) for bits in BITS_AFTER)
    networks = {network for network, _, _ in averaged}
    methods = [method for method in AFTER if method != "brecq"]  # which is not run everywhere
    cells = [(n, b) for n in sorted(networks) for b in bits if all((n, m, b) in averaged for m in methods)]
    if not cells:
        return None
    mean = {m: statistics.mean(averaged[n, m, b] for n, b in cells) for m in methods}
    best = min(mean.values())
    return mean["gptq"] <= best + 0.05 and mean["uniform"] <= best + 0.05, _said(mean, f"mean of {len(cells)} cells")


def _brecq_on_mnist(averaged: Means) -> tuple[bool, str] | None:
    networks = [name for name in PERCEPTRONS if name.startswith("mnist")]
    bits = ("W4A8", "W3A8", "W2A8")
    cells = [(n, b) for n in networks for b in bits if all((n, m, b) in averaged for m in AFTER)]
    if not cells:
        return None
    behind = {f"{n} {b}": averaged[n, "brecq", b] - min(averaged[n, m, b] for m in AFTER) for n, b in cells}
    return max(behind.values()) <= NEAR, _said(behind, "behind the best method")


def _over(averaged: Means, networks: Iterable[str], method: str, bits: Iterable[str]) -> list[float]:
    keys = [(network, method, b) for network in networks for b in bits]
    return [averaged[key] for key in keys if key in averaged]


def _said(numbers: Mapping[str, float], of: str) -> str:
    return f"points lost, {of}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


FINDINGS = (
    Finding("LSQ, LSQ+ and PACT near full precision at 4 bits on shallow KANs", _near_full_precision),
    Finding("DoReFa most stable on deep KAGN at few bits", _most_stable),
    Finding("GPTQ and Uniform strongest after training", _strongest_after),
    Finding("BRECQ competitive on MNIST", _brecq_on_mnist),
)
