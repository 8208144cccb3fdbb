"""Choose bits for every layer: the least total sensitivity within a budget of bytes and, where given, of time.

Both choices are exact. With a size budget alone, dynamic programming over the layers keeps every pair of (bytes,
sensitivity) that no other pair beats in both; with a latency table as well it is an integer program with one binary
variable for each layer and option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from kancompile.errors import KanCompileError


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Attributes:
        bits: of its weights.
        bytes: what it takes in the file.
        sensitivity: expected rise of the loss.
        latency: seconds of one run, ``None`` where it was not measured.
    """

    bits: int
    bytes: int
    sensitivity: float
    latency: float | None = None


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer and what it comes to.

    Attributes:
        choices: by layer.
        bytes, sensitivity: totals.
        latency: total seconds, ``None`` where a choice has none.
    """

    choices: Mapping[str, Choice]

    @property
    def bytes(self) -> int:
        """Total size."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def sensitivity(self) -> float:
        """Total expected rise of the loss."""
        return sum(choice.sensitivity for choice in self.choices.values())

    @property
    def latency(self) -> float | None:
        """Total time."""
        times = [choice.latency for choice in self.choices.values()]
        return None if any(time is None for time in times) else sum(time for time in times if time is not None)


def pareto_front(options: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """List every allocation that is not beaten in bytes and sensitivity, smallest first.

    Exact: a partial allocation that another one beats in both stays beaten whatever the other layers take.
    """
    _check(options)
    front: list[tuple[int, float, tuple[Choice, ...]]] = [(0, 0.0, ())]
    for choices in options.values():
        extended = [
            (size + choice.bytes, cost + choice.sensitivity, (*chosen, choice))
            for size, cost, chosen in front
            for choice in choices
        ]
        extended.sort(key=lambda entry: entry[:2])
        front = []
        for entry in extended:
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    return [Allocation(dict(zip(options, chosen, strict=True))) for _, _, chosen in front]


def allocate(options: Mapping[str, Sequence[Choice]], max_bytes: int, max_latency: float | None = None) -> Allocation:
    """Choose one option for each layer: least sensitivity, then fewest bytes, within the budgets.

    Args:
        options: by layer.
        max_bytes: budget for all layers together.
        max_latency: budget in seconds; every choice then needs a measured latency.

    Raises:
        KanCompileError: no allocation fits; the message says what can be reached.
    """
    _check(options)
    smallest = sum(min(choice.bytes for choice in choices) for choices in options.values())
    if max_bytes < smallest:
        raise KanCompileError(
            f"size budget {max_bytes!r} bytes, but the smallest reachable size is {smallest} bytes; raise the budget, "
            "allow fewer bits or fewer table rows (levels)"
        )
    if max_latency is None:
        return [allocation for allocation in pareto_front(options) if allocation.bytes <= max_bytes][-1]
    return _integer_program(options, max_bytes, max_latency)


def _integer_program(options: Mapping[str, Sequence[Choice]], max_bytes: int, max_latency: float) -> Allocation:
    flat = [(layer, choice) for layer, choices in options.items() for choice in choices]
    missing = sorted({layer for layer, choice in flat if choice.latency is None})
    if missing:
        raise KanCompileError(f"latency budget {max_latency!r}, but layers {missing!r} have no measured latency")
    sizes = np.array([choice.bytes for _, choice in flat], dtype=np.float64)
    times = np.array([choice.latency for _, choice in flat], dtype=np.float64)
    costs = np.array([choice.sensitivity for _, choice in flat], dtype=np.float64)
    layers = list(options)
    one_each = np.array([[float(layer == owner) for owner, _ in flat] for layer in layers])

    def solve(objective: np.ndarray, limits: Sequence[LinearConstraint]) -> np.ndarray | None:
        exactly_one = LinearConstraint(one_each, 1, 1)
        result = milp(
            objective,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[exactly_one, *limits],
            options={"mip_rel_gap": 0.0},
        )
        return None if result.x is None else np.asarray(np.round(result.x), dtype=np.float64)

    by_size = LinearConstraint(sizes[None], -np.inf, max_bytes)
    by_time = LinearConstraint(times[None], -np.inf, max_latency)
    # the solver works to absolute tolerances near 1e-6: bring sensitivities, which may be far smaller, to order 1
    unit = float(np.abs(costs).max()) or 1.0
    chosen = solve(costs / unit, [by_size, by_time])
    if chosen is None:
        fastest = solve(times, [by_size])
        reachable = float("nan") if fastest is None else float(times @ fastest)
        raise KanCompileError(
            f"latency budget {max_latency!r} s, but within {max_bytes} bytes the smallest reachable latency is "
            f"{reachable:.6g} s; raise one of the budgets"
        )
    return Allocation({layer: choice for (layer, choice), one in zip(flat, chosen, strict=True) if one})


def _check(options: Mapping[str, Sequence[Choice]]) -> None:
    if not options:
        raise KanCompileError("bit allocation: found no layer, expected at least one")
    for layer, choices in options.items():
        if not choices:
            raise KanCompileError(f"layer {layer!r}: no choice of bits was given, expected at least one")
        for choice in choices:
            if not np.isfinite(choice.sensitivity):
                raise KanCompileError(
                    f"layer {layer!r}: sensitivity at {choice.bits} bits is {choice.sensitivity!r}, expected a finite "
                    "number"
                )
