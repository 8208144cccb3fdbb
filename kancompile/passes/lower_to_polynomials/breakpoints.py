"""Find where a captured region is not smooth, by watching its operators while it runs.

A breakpoint is an input where the state of some switch changes (``observed_region``). Each change is bisected
in the order of float32 numbers down to two neighbors, of which the upper one is the breakpoint: exact for comparisons of
either kind.

Every element of a state depends on one input only, so all inputs are bisected at the same time, one row for each change.
A state that differs at a single float only (``x == 3``) is not seen.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.passes.lower_to_polynomials.observed_region import Region
from kancompile.recipe import FunctionCosts

_FEW_FLOATS = 4  # breakpoints this many floats apart count as one
_MOST_CHANGES = 2048  # for each input
_MOST_STEPS = 256  # between two points


@dataclass(frozen=True)
class Smoothness:
    """Where a region is not smooth, and how its operators behave.

    Attributes:
        breakpoints: for each of the P inputs its breakpoints, float32, ascending, a cell begins at each; ``None`` where
            states change more often than could ever be tabulated.
        nanoseconds: estimated time of ONNX Runtime for one input.
        risky: operators near the edge of their domain.
    """

    breakpoints: list[Tensor] | None
    nanoseconds: float
    risky: frozenset[str]


class _TooMany(Exception):
    pass


def find_breakpoints(region: Region, points: Tensor, costs: FunctionCosts) -> Smoothness:
    """Find all breakpoints between the first and the last of some points.

    Args:
        region: what to look at.
        points: ascending inputs ``[n]``; a state that changes and changes back between two of them is missed.
        costs: of operators.
    """
    points = points.float()
    filled = points[:, None].expand(-1, region.inputs)
    changes: list[tuple[int, Tensor, Tensor]] = []  # switch, element, number of the point before the change
    risky: set[str] = set()
    nanoseconds = 0.0
    count = 0
    for start in range(0, len(points) - 1, region.chunk - 1):
        rows = filled[start : start + region.chunk]
        seen = region.observe(rows)
        risky |= {name for name, _, near in seen.margins if near}
        nanoseconds = seen.nanoseconds(costs) / rows.numel()
        for number, state in enumerate(seen.states):
            row, place = (state[1:] != state[:-1]).nonzero(as_tuple=True)
            count += len(row)
            if len(row) > 0 and count <= _MOST_CHANGES * region.inputs:
                changes.append((number, place, row + start))
    if count == 0:
        return Smoothness([torch.empty(0)] * region.inputs, nanoseconds, frozenset(risky))
    found: list[Tensor] | None = None
    if count <= _MOST_CHANGES * region.inputs:
        switch = torch.cat([torch.full_like(place, number) for number, place, _ in changes])
        element = torch.cat([place for _, place, _ in changes])
        before = torch.cat([row for _, _, row in changes])
        with contextlib.suppress(_TooMany):
            owner, values = _Changes(region, switch, element, points[before], points[before + 1]).bisect()
            order = torch.argsort(owner, stable=True)
            sizes = torch.bincount(owner, minlength=region.inputs).tolist()
            found = [merge(part) for part in torch.split(values[order], sizes)]
    return Smoothness(found, nanoseconds, frozenset(risky))


def merge(values: Tensor) -> Tensor:
    """Sort, and keep one of those that are a few floats apart."""
    ordered = torch.unique(values)
    kept: list[float] = []
    last = -(1 << 62)
    for value, rank in zip(ordered.tolist(), _rank(ordered).tolist(), strict=True):
        if rank - last > _FEW_FLOATS and not (kept and abs(value - kept[-1]) < 1e-30):
            kept.append(value)
            last = rank
    return torch.tensor(kept, dtype=torch.float32)


def _rank(values: Tensor) -> Tensor:
    """Number float32 values in their order, int64; neighbors differ by 1."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _from_rank(rank: Tensor) -> Tensor:
    bits = torch.where(rank >= 0, rank, (-rank) | 0x80000000)
    return torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


@dataclass
class _Changes:
    """State changes: which switch and element, and the inputs between which it happens."""

    region: Region
    switch: Tensor
    element: Tensor
    low: Tensor
    high: Tensor

    def bisect(self) -> tuple[Tensor, Tensor]:
        """Locate all changes; returns the input that causes each and the float32 value, both ``[m]``."""
        owner = self._owners()
        seen = owner >= 0
        owner, switch, element = owner[seen], self.switch[seen], self.element[seen]
        low, high = _rank(self.low[seen]), _rank(self.high[seen])
        owners: list[Tensor] = []
        found: list[Tensor] = []
        while len(low):
            if len(found) >= _MOST_STEPS:
                raise _TooMany
            state_low = self._states(owner, low, switch, element)
            end = high
            state_end = self._states(owner, end, switch, element)
            if float((state_end - state_low).abs().max()) > _MOST_STEPS - len(found):  # each round finds a step of one
                raise _TooMany
            while bool((high - low > 1).any()):
                middle = (low + high) // 2
                same = self._states(owner, middle, switch, element) == state_low
                low, high = torch.where(same, middle, low), torch.where(same, high, middle)
            owners.append(owner)
            found.append(_from_rank(high))
            more = self._states(owner, high, switch, element) != state_end  # floor may step more than once
            owner, switch, element, low, high = owner[more], switch[more], element[more], high[more], end[more]
        return torch.cat(owners), torch.cat(found)

    def _states(self, owner: Tensor, rank: Tensor, switch: Tensor, element: Tensor) -> Tensor:
        """Read one state for each change, with its input at the value of that rank; float64 ``[m]``."""
        row = count_before(owner)
        x = torch.zeros(int(row.max()) + 1, self.region.inputs)
        x[row, owner] = _from_rank(rank)
        result = torch.empty(len(owner), dtype=torch.float64)
        for start in range(0, len(x), self.region.chunk):
            part = x[start : start + self.region.chunk]
            states = self.region.observe(part).states
            here = ((row >= start) & (row < start + len(part))).nonzero()[:, 0]
            for number in torch.unique(switch[here]).tolist():
                chosen = here[switch[here] == number]
                result[chosen] = states[number][row[chosen] - start, element[chosen]].double()
        return result

    def _owners(self) -> Tensor:
        """Find which input each changing state depends on; -1 for changes that are rounding alone.

        Inputs are set to one of two values by the binary digits of their numbers; the state shows the digits. Where an
        argument comes close to the threshold and turns back, as ``abs(x ** 2)`` does at 0, its state can flicker by the
        rounding of products that a batch of another size sums up in another order. It is alike a step further on both sides.
        """
        width = int(self.element.max()) + 1
        changing, of = torch.unique(self.switch * width + self.element, return_inverse=True)
        switch, element = changing // width, changing % width
        owner = torch.full_like(element, -1)
        bits = max(1, (self.region.inputs - 1).bit_length())
        digit = (torch.arange(self.region.inputs)[None] >> torch.arange(bits)[:, None]) & 1
        pairs, pair = torch.unique(torch.stack([self.low, self.high], 1), dim=0, return_inverse=True)
        left = torch.ones_like(pair, dtype=torch.bool)  # changes whose own ends were not tried
        low, high = self.low.min(), self.high.max()
        while True:
            ends = torch.stack([low, high])[:, None].expand(-1, self.region.inputs)
            states = self.region.observe(torch.cat([ends, torch.where(digit == 1, high, low)])).states
            for number in torch.unique(switch[owner < 0]).tolist():
                open_ = ((owner < 0) & (switch == number)).nonzero()[:, 0]
                state = states[number][:, element[open_]]
                differs = state[0] != state[1]
                digits = (state[2:] == state[1]).long() << torch.arange(bits)[:, None]
                owner[open_[differs]] = digits.sum(0)[differs]
            missing = left & (owner[of] < 0)
            if not bool(missing.any()):
                return owner[of]
            # states that are alike at both ends change within: most of those that are left, between these two points
            most = int(torch.bincount(pair[missing]).argmax())
            left &= pair != most
            low, high = pairs[most]
            low, high = low - (high - low), high + (high - low)


def count_before(values: Tensor) -> Tensor:
    """Number the occurrences of each value, in order: 0 for the first."""
    ordered, order = torch.sort(values, stable=True)
    starts = torch.searchsorted(ordered, ordered)
    result = torch.empty_like(values)
    result[order] = torch.arange(len(values)) - starts
    return result
