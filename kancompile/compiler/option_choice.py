"""Choose one option for every layer, exactly: an integer program over bits, rows and functions.

With ``x[l, o]`` 1 for the option ``o`` of layer ``l``, ``noise[m]`` what it brings to output ``m`` and ``power[m]`` that of the
signal about its mean,

    at a goal      min  sum x bytes     where  sum x noise[m] <= goal[m]  for every output m
    at budgets     min  t               where  sum x noise[m] <= t power[m]

and in both ``sum x bytes <= max_bytes`` and ``sum x nanoseconds <= max_nanoseconds``. Errors of different origin add up in
variance, as second-order sensitivities have it (Dong et al., *HAWQ-V2*, 2020, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from kancompile.validation import decibel

_FRONT_GAP, _FRONT_STEP_DB = 1e-3, 0.01
"""How far from exact a point of a front may be, and by how much more precise than the last one the next has to be."""


@dataclass(frozen=True)
class Option:
    """What one layer may get.

    Attributes:
        change: keys of its recipe.
        bytes: of its constants.
        noise: it brings to each output, float64 ``[m]``.
        nanoseconds: of a call, estimated.
    """

    change: Mapping[str, Any]
    bytes: int
    noise: Tensor
    nanoseconds: float = 0.0


Options = Mapping[str, Sequence[Option]]
Choice = Mapping[str, Option]


def choose_options(
    options: Options,
    power: Tensor,
    goal_db: float | None,
    max_bytes: float,
    max_nanoseconds: float = np.inf,
    gap: float = 0.0,
) -> dict[str, Option] | None:
    """Choose one option for each layer: fewest bytes at a goal, or least share of noise within budgets without one.

    Args:
        options: by layer.
        power: of each output about its mean, float64 ``[m]``.
        goal_db: SQNR that every output must have.
        max_bytes: of all constants together.
        max_nanoseconds: of all layers together.
        gap: relative distance from the best that is allowed.

    Returns:
        an option for each layer, ``None`` where no choice is allowed.
    """
    flat = [(name, option) for name, few in options.items() for option in few]
    varies = power > 0
    share = np.stack([(option.noise / power)[varies].numpy() for _, option in flat], axis=1)  # [m, options]
    size = np.array([float(option.bytes) for _, option in flat])
    time = np.array([option.nanoseconds for _, option in flat])
    owner = np.array([[float(name == own) for own, _ in flat] for name in options])
    finite = np.isfinite(share).all(0)
    # the solver's tolerances are absolute: shares of noise are brought to order 1
    unit = 10 ** (-goal_db / 10) if goal_db is not None else 1.0
    if goal_db is None and share.size and finite.any():
        unit = float(np.median(share[:, finite].max(0))) or 1.0
    share = np.where(np.isfinite(share), share / unit, 0.0)
    limits = [LinearConstraint(np.c_[owner, np.zeros(len(owner))], 1, 1)]
    limits += [
        LinearConstraint(np.r_[amount, 0][None], -np.inf, most)
        for amount, most in ((size, max_bytes), (time, max_nanoseconds))
        if np.isfinite(most)
    ]
    limits.append(LinearConstraint(np.c_[share, -np.ones(len(share))], -np.inf, 0))
    whole = np.r_[np.ones(len(flat)), 0.0]
    most = np.r_[finite.astype(float), np.inf if goal_db is None else 1.0]
    # of equal points the smaller one, and of as small ones the more precise one
    aim = np.r_[size, 1e-3] if goal_db is not None else np.r_[size * 1e-9 / max(1.0, float(np.abs(size).max())), 1.0]
    result = milp(aim, integrality=whole, bounds=Bounds(0, most), constraints=limits, options={"mip_rel_gap": gap})
    if result.x is None:
        return None
    return {name: option for (name, option), taken in zip(flat, result.x, strict=False) if taken > 0.5}


def least(options: Options, max_bytes: float = np.inf) -> float | None:
    """Find the fewest nanoseconds of all layers together within so many bytes, ``None`` where no choice takes as few."""
    flat = [(name, option) for name, few in options.items() for option in few]
    owner = np.array([[float(name == own) for own, _ in flat] for name in options])
    time = np.array([option.nanoseconds for _, option in flat])
    limits = [LinearConstraint(owner, 1, 1)]
    if np.isfinite(max_bytes):
        limits.append(LinearConstraint(np.array([[float(option.bytes) for _, option in flat]]), -np.inf, max_bytes))
    result = milp(time, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=limits)
    return None if result.x is None else float(time @ np.round(result.x))


def best_uniform(
    options: Options, power: Tensor, max_bytes: float, max_nanoseconds: float = np.inf
) -> dict[str, Option] | None:
    """Choose the best point at which all layers have the same width and, where they have a choice, the same rows."""
    best: tuple[float, dict[str, Option]] | None = None
    for option in next(iter(options.values())):
        width = option.change["weight_bits"]
        for rows in dict.fromkeys(one.change.get("levels") for few in options.values() for one in few):
            chosen = {
                name: next((one for one in few if _is_of(one, width, rows)), None) for name, few in options.items()
            }
            point = {name: one for name, one in chosen.items() if one is not None}
            if len(point) < len(options) or bytes_of(point) > max_bytes or nanoseconds_of(point) > max_nanoseconds:
                continue
            worst = worst_db(power, noise_of(point))
            if best is None or worst > best[0]:
                best = worst, point
    return None if best is None else best[1]


def predicted_front(options: Options, power: Tensor, points: int = 6) -> list[dict[str, Option]]:
    """Choose along the Pareto front in bytes, nanoseconds and error: the least error at budgets between the least and the most.

    Budgets of bytes without one of time, and the other way around, each in equal ratios; points that another one beats in all
    three are left out.

    Returns:
        at most ``2 * points`` choices, the fewest bytes first.
    """
    found: list[dict[str, Option]] = []
    for amount in (bytes_of, nanoseconds_of):
        each = [[float(amount({name: one})) for one in few] for name, few in options.items()]
        least_of_all, most_of_all = sum(map(min, each)), sum(map(max, each))
        if not 0 < least_of_all < most_of_all:
            continue
        for budget in np.geomspace(least_of_all, most_of_all, points) * (1 + 1e-9):
            limits = (float(budget), np.inf) if amount is bytes_of else (np.inf, float(budget))
            chosen = choose_options(options, power, None, *limits, gap=_FRONT_GAP)
            if chosen is not None and all(chosen != other for other in found):
                found.append(chosen)
    measures = [(bytes_of(one), nanoseconds_of(one), -worst_db(power, noise_of(one))) for one in found]
    kept = [one for one, own in zip(found, measures, strict=True) if not any(_beats(other, own) for other in measures)]
    return sorted(kept, key=bytes_of)


def neighbors(
    options: Options, power: Tensor, chosen: Choice, max_bytes: float, max_nanoseconds: float
) -> list[dict[str, Option]]:
    """Choose the next points of the front: the least error in fewer bytes, in less time, and the fewest bytes at less error.

    Args:
        options: by layer.
        power: of each output, float64 ``[m]``.
        chosen: the point whose neighbors they are.
        max_bytes, max_nanoseconds: budgets, of which a neighbor moves one.
    """
    size, time = bytes_of(chosen), nanoseconds_of(chosen)
    reached = worst_db(power, noise_of(chosen))
    found = [choose_options(options, power, None, size - 1, max_nanoseconds)]
    if np.isfinite(max_nanoseconds):
        found.append(choose_options(options, power, None, max_bytes, time * (1 - 1e-6)))
    if np.isfinite(reached):
        found.append(choose_options(options, power, reached + _FRONT_STEP_DB, np.inf, max_nanoseconds))
    distinct: list[dict[str, Option]] = []
    for one in found:
        if one is not None and one != chosen and one not in distinct:
            distinct.append(one)
    return distinct


def bytes_of(chosen: Choice) -> int:
    """Add up constants."""
    return sum(option.bytes for option in chosen.values())


def nanoseconds_of(chosen: Choice) -> float:
    """Add up times."""
    return sum(option.nanoseconds for option in chosen.values())


def noise_of(chosen: Choice) -> Tensor:
    """Add up noise, float64 ``[m]``."""
    return torch.stack([option.noise for option in chosen.values()]).sum(0)


def worst_db(power: Tensor, noise: Tensor) -> float:
    """Give the SQNR of the worst output; outputs that do not vary do not count."""
    return min((decibel(float(a), float(b)) for a, b in zip(power, noise, strict=True) if a > 0), default=np.inf)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _is_of(option: Option, width: Any, rows: int | None) -> bool:
    return bool(option.change["weight_bits"] == width) and option.change.get("levels", rows) == rows
