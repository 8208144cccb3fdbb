"""Find where a captured region is not smooth, by watching its operators while it runs.

Every operator whose derivative jumps (relu, abs, clamp, maximum), whose value jumps (floor, round) or that returns
whole numbers or truth values (comparisons, argmax, searchsorted) is a *switch*: it has a state, such as the sign of
its argument. A breakpoint is an input where some state changes. States are read while ATen runs the region, so no
class and no form of graph is presumed; each change is bisected in the order of float32 numbers down to two
neighbours, of which the upper one is the breakpoint: exact for comparisons of either kind.

Every element of a state depends on one input only, so all inputs are bisected at the same time, one row for each change.
A state that differs at a single float only (``x == 3``) is not seen.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kancompile.expansions import to_channels_first

_FEW_FLOATS = 4  # breakpoints this many floats apart count as one
_CHUNK_ELEMENTS = 1 << 20
_MOST_CHANGES = 2048  # for each input
_MOST_STEPS = 256  # between two points
_MARGIN = 1e-6  # ONNX Runtime's Tanh overshoots 1 by 2.4e-7

# estimated times of ONNX Runtime 1.32, one thread of x86-64, tensors larger than the second-level cache
_SPAN = 16.0  # ns for each contiguous run of a broadcast operand
_OPERATION = 0.4  # ns for each element of an elementwise operator
_SLOW = {"index": 10.0, "pow": 0.9, "gelu": 1.5, "erf": 1.0, "log": 1.0, "sin": 2.0, "cos": 2.5, "tan": 4.0}
_SLOW |= dict.fromkeys(("acos", "asin", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"), 1.5)

_SIGN = frozenset(("relu", "leaky_relu", "_prelu_kernel", "elu", "celu", "abs", "sign", "sgn", "rrelu", "heaviside"))
_STEP = frozenset(("floor", "ceil", "round", "trunc", "fix", "floor_divide"))

_MARGINS: dict[str, Callable[[Tensor], Tensor]] = {
    "acos": lambda a: 1 - a.abs(),
    "asin": lambda a: 1 - a.abs(),
    "atanh": lambda a: 1 - a.abs(),
    "acosh": lambda a: a - 1,
    "erfinv": lambda a: 1 - a.abs(),
    "logit": lambda a: torch.minimum(a, 1 - a),
    "log1p": lambda a: 1 + a,
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), lambda a: a),
}


@dataclass
class Observation:
    """What running a region showed.

    Attributes:
        states: the state of every switch, in the order of execution.
        nanoseconds: estimated time of ONNX Runtime, one thread.
        margins: for every operator of restricted domain its name, its number of elements, and whether one of them is
            within 1e-6 of the edge, where another implementation of the operators before it may be outside.
    """

    states: list[Tensor] = field(default_factory=list)
    nanoseconds: float = 0.0
    margins: list[tuple[str, int, bool]] = field(default_factory=list)


class ObserveRegion(TorchDispatchMode):
    """Run ATen operators, in float64 if wished, and record what they do."""

    def __init__(self, double: bool = False, observe: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.double = double
        self.seen = Observation() if observe else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if self.double and not func._schema.is_mutable:
            args, kwargs = tree_map(_to_double, args), tree_map(_to_double, kwargs)
        out = func(*args, **kwargs)
        if self.seen is not None:
            self._observe(func, args, kwargs, out)
        return out

    def _observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        assert self.seen is not None
        name = func._schema.name.removeprefix("aten::")
        inputs = [value for value in _tensors((args, kwargs)) if value.is_floating_point()]
        if inputs:
            self.seen.states += _switch_states(name, args, kwargs, out)
        self.seen.nanoseconds += _nanoseconds(name, func, args, out)
        margin = _MARGINS.get(name)
        if name == "pow" and len(args) > 1 and not _is_whole(args[1]):
            margin = _MARGINS["sqrt"]
        if margin is not None and isinstance(args[0], Tensor):
            near = not float(margin(args[0]).amin()) >= _MARGIN  # NaN counts as near
            self.seen.margins.append((name, args[0].numel(), near))


def _is_whole(exponent: Any) -> bool:
    """Whether an exponent is a whole number; other powers are steep next to 0."""
    return bool((exponent == exponent.round()).all()) if isinstance(exponent, Tensor) else float(exponent).is_integer()


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype is torch.float32 else value
    return torch.float64 if value is torch.float32 else value


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


def _switch_states(name: str, args: Any, kwargs: Any, out: Any) -> list[Tensor]:
    """Give the states of a switch; none for operators that are smooth."""
    whole = [value for value in _tensors(out) if not value.is_floating_point() and not value.is_complex()]
    if whole:
        return whole
    if name in _SIGN:
        return [args[0] > 0]
    if name in _STEP or (name == "div" and kwargs.get("rounding_mode")):
        return [out]
    if name in ("clamp", "hardtanh", "clip"):
        named = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        default = 1.0 if name == "hardtanh" else None
        low = named.get("min", named.get("min_val", default and -default))
        high = named.get("max", named.get("max_val", default))
        return [args[0] < edge for edge in (low,) if edge is not None] + [
            args[0] > edge for edge in (high,) if edge is not None
        ]
    if name in ("clamp_min", "clamp_max", "threshold"):
        return [args[0] > args[1]]
    if name in ("maximum", "minimum", "fmax", "fmin"):
        return [args[0] >= args[1]]
    if name in ("frac", "fmod", "remainder"):
        return [torch.trunc(args[0]) if name == "frac" else torch.floor(args[0] / args[1])]
    if name in ("hardswish", "hardsigmoid"):
        return [args[0] > -3, args[0] > 3]
    if name in ("hardshrink", "softshrink"):
        edge = args[1] if len(args) > 1 else 0.5
        return [args[0] > edge, args[0] < -edge]
    if name in ("amax", "amin") and len(args) > 1 and len(args[1]) == 1:
        return [torch.argmax(args[0] if name == "amax" else -args[0], dim=args[1][0])]
    return []


def _nanoseconds(name: str, func: Any, args: Any, out: Any) -> float:
    """Estimate an operator's time: by its elements, and by the runs into which broadcasting cuts an operand."""
    if not isinstance(out, Tensor) or any(argument.alias_info for argument in func._schema.arguments):
        return 0.0
    runs = 0
    for value in _tensors(args):
        if torch.Tag.pointwise in func.tags and 1 < value.numel() < out.numel():
            shape = (1,) * (out.dim() - value.dim()) + tuple(value.shape)
            runs = max(runs, out.numel() // _run(shape, tuple(out.shape)))
    return out.numel() * _SLOW.get(name, _OPERATION) + runs * _SPAN


def _run(shape: Sequence[int], whole: Sequence[int]) -> int:
    """Number of trailing elements over which an operand is read straight, or stays the same."""
    same, still = 1, 1
    for size, full in zip(reversed(shape), reversed(whole), strict=True):
        if size != full:
            break
        same *= full
    for size, full in zip(reversed(shape), reversed(whole), strict=True):
        if size != 1:
            break
        still *= full
    return max(same, still)


@dataclass(frozen=True)
class Region:
    """The branches of an expansion, evaluated with an own value for every input.

    Attributes:
        branches: modules that map ``[rows, *anchor_shape]`` to ``[rows, *in_shape, k]``.
        anchor_shape: of what they read, without the rows.
        in_shape: ``(*, n_in)``, the same elements regrouped; this is the order of the inputs.
        channels_first: whether the anchor is ``(n_in, *)``.
    """

    branches: Sequence[nn.Module]
    anchor_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    channels_first: bool = False

    @property
    def inputs(self) -> int:
        """Number of inputs P, leading dimensions included."""
        return math.prod(self.anchor_shape)

    @property
    def chunk(self) -> int:
        """Number of rows that are evaluated at once."""
        return max(2, _CHUNK_ELEMENTS // (16 * self.inputs))

    def __call__(self, x: Tensor, double: bool) -> Tensor:
        """Map ``[rows, P]`` to values ``[rows, P, k]``, float64."""
        values = []
        for part in torch.split(x, self.chunk):
            anchor = self._anchor(part.to(torch.float64 if double else torch.float32))
            with torch.no_grad(), ObserveRegion(double):
                columns = [branch(anchor) for branch in self.branches]
            values.append(torch.cat([column.reshape(len(part), self.inputs, -1).double() for column in columns], -1))
        return torch.cat(values)

    def _anchor(self, x: Tensor) -> Tensor:
        if self.channels_first:
            return to_channels_first(x.reshape(-1, *self.in_shape)).contiguous()
        return x.reshape(-1, *self.anchor_shape)

    def observe(self, x: Tensor) -> Observation:
        """Run ``[rows, P]`` in float32; reports states ``[rows, elements]`` of what depends on ``x``, and no other."""
        seen = self._observe(x)
        varies, domains = self._varying
        seen.states = [state.reshape(len(x), -1) for state, keep in zip(seen.states, varies, strict=True) if keep]
        seen.margins = [margin for margin, keep in zip(seen.margins, domains, strict=True) if keep]
        return seen

    @functools.cached_property
    def _varying(self) -> tuple[list[bool], list[bool]]:
        """Tell which states and margins depend on the input: those whose size grows with the number of rows."""
        two, three = (self._observe(torch.zeros(rows, self.inputs)) for rows in (2, 3))
        states = [b.numel() > a.numel() for a, b in zip(two.states, three.states, strict=True)]
        margins = [b[1] > a[1] for a, b in zip(two.margins, three.margins, strict=True)]
        return states, margins

    def _observe(self, x: Tensor) -> Observation:
        with torch.no_grad(), ObserveRegion(observe=True) as mode:
            for branch in self.branches:
                branch(self._anchor(x.to(torch.float32)))
        seen: Observation | None = mode.seen
        assert seen is not None
        return seen


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


def find_breakpoints(region: Region, points: Tensor) -> Smoothness:
    """Find all breakpoints between the first and the last of some points.

    Args:
        region: what to look at.
        points: ascending inputs ``[n]``; a state that changes and changes back between two of them is missed.
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
        nanoseconds = seen.nanoseconds / rows.numel()
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
    """Number float32 values in their order, int64; neighbours differ by 1."""
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
        low, high = _rank(self.low), _rank(self.high)
        switch, element = self.switch, self.element
        owners: list[Tensor] = []
        found: list[Tensor] = []
        while len(low):
            if len(found) >= _MOST_STEPS:
                raise _TooMany
            state_low = self._states(owner, low, switch, element)
            end = high
            state_end = self._states(owner, end, switch, element)
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
        """Find which input each changing state depends on.

        Inputs are set to one of two values by the binary digits of their numbers; the state shows the digits.
        """
        owner = torch.full_like(self.element, -1)
        bits = max(1, (self.region.inputs - 1).bit_length())
        digit = (torch.arange(self.region.inputs)[None] >> torch.arange(bits)[:, None]) & 1
        pairs = [(float(self.low.min()), float(self.high.max()))]
        while bool((owner < 0).any()):
            if not pairs:
                first = int((owner < 0).nonzero()[0])
                pairs.append((float(self.low[first]), float(self.high[first])))
            low, high = pairs.pop()
            rows = torch.cat([torch.full((1, self.region.inputs), low), torch.full((1, self.region.inputs), high)])
            rows = torch.cat([rows, torch.where(digit == 1, high, low)])
            states = self.region.observe(rows).states
            for number in torch.unique(self.switch[owner < 0]).tolist():
                open_ = ((owner < 0) & (self.switch == number)).nonzero()[:, 0]
                state = states[number][:, self.element[open_]]
                differs = state[0] != state[1]
                digits = (state[2:] == state[1]).long() << torch.arange(bits)[:, None]
                owner[open_[differs]] = digits.sum(0)[differs]
        return owner


def count_before(values: Tensor) -> Tensor:
    """Number the occurrences of each value, in order: 0 for the first."""
    ordered, order = torch.sort(values, stable=True)
    starts = torch.searchsorted(ordered, ordered)
    result = torch.empty_like(values)
    result[order] = torch.arange(len(values)) - starts
    return result
