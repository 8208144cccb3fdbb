"""Run a captured region on an own value for every input, and watch its operators while it runs.

Every operator whose derivative jumps (relu, abs, clamp, maximum), whose value jumps (floor, round) or that returns
whole numbers or truth values (comparisons, argmax, searchsorted) is a *switch*: it has a state, such as the sign of
its argument. States are read while ATen runs the region, so no class and no form of graph is presumed.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kancompile.ir import to_channels_first
from kancompile.recipe import FunctionCosts

_CHUNK_ELEMENTS = 1 << 20
_GOLDEN = (5**0.5 - 1) / 2
_SCALES = (0.5, 2.0, 8.0, 32.0)
_MARGIN = 1e-6  # ONNX Runtime's Tanh overshoots 1 by 2.4e-7

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
        elements: how many elements operators returned, by their names.
        runs: contiguous runs into which broadcasting cut operands.
        margins: for every operator of restricted domain its name, its number of elements, and whether one of them is
            within 1e-6 of the edge, where another implementation of the operators before it may be outside.
    """

    states: list[Tensor] = field(default_factory=list)
    elements: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    margins: list[tuple[str, int, bool]] = field(default_factory=list)

    def nanoseconds(self, costs: FunctionCosts) -> float:
        """Estimate the time of ONNX Runtime, one thread."""
        elements = sum(count * costs.of_operator(name) for name, count in self.elements.items())
        return elements + self.runs * costs.run


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
        if isinstance(out, Tensor) and not any(argument.alias_info for argument in func._schema.arguments):
            self.seen.elements[name] += out.numel()
            self.seen.runs += _runs(args, out) if torch.Tag.pointwise in func.tags else 0
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


def _runs(args: Any, out: Tensor) -> int:
    """Count the contiguous runs into which broadcasting cuts an operand."""
    runs = 0
    for value in _tensors(args):
        if 1 < value.numel() < out.numel():
            shape = (1,) * (out.dim() - value.dim()) + tuple(value.shape)
            runs = max(runs, out.numel() // _run(shape, tuple(out.shape)))
    return runs


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
class _Layout:
    """Where the rows of a region lie in a tensor that it computes: in one axis, alone or with others outside or inside."""

    axis: int
    is_outer: bool

    def rows_first(self, value: Tensor, rows: int) -> Tensor:
        """Bring ``[..., rows * others, ...]`` or ``[..., others * rows, ...]`` to ``[rows, elements]``."""
        parts = (rows, -1) if self.is_outer else (-1, rows)
        apart: Tensor = value.unflatten(self.axis, parts)  # type: ignore[no-untyped-call]
        return apart.movedim(self.axis + (not self.is_outer), 0).reshape(rows, -1)


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
        layouts, domains = self._varying
        states = zip(seen.states, layouts, strict=True)
        seen.states = [layout.rows_first(state, len(x)) for state, layout in states if layout is not None]
        seen.margins = [margin for margin, keep in zip(seen.margins, domains, strict=True) if keep]
        return seen

    @functools.cached_property
    def _varying(self) -> tuple[list[_Layout | None], list[bool]]:
        """Tell where rows lie in each state, ``None`` where it does not depend on the input, and which margins do.

        What depends on the input grows with the number of rows. A model may bring groups of inputs to the front before it
        computes; where rows lie inside an axis then is read from rows of their own and as many that are equal.
        """
        two, three = (self._observe(torch.zeros(rows, self.inputs)) for rows in (2, 3))
        margins = [b[1] > a[1] for a, b in zip(two.margins, three.margins, strict=True)]
        if not two.states:
            return [], margins
        scattered = (torch.arange(3 * self.inputs) * _GOLDEN % 1 - 0.5).reshape(3, self.inputs)
        mixed, alone = [], []
        for scale in _SCALES:
            rows = scale * scattered
            mixed.append(self._observe(rows).states)
            alone.append([self._observe(row.expand(3, -1)).states for row in rows])
        layouts: list[_Layout | None] = []
        for number, (a, b) in enumerate(zip(two.states, three.states, strict=True)):
            grown = [axis for axis in range(a.dim()) if 3 * a.shape[axis] == 2 * b.shape[axis]]
            ways = [_Layout(axis, is_outer) for axis in grown[:1] for is_outer in (True, False)]
            right = (
                way
                for way in ways
                if all(
                    torch.equal(way.rows_first(seen[number], 3)[row], way.rows_first(states[number], 3)[row])
                    for seen, each in zip(mixed, alone, strict=True)
                    for row, states in enumerate(each)
                )
            )
            layouts.append(next(right, ways[0] if ways else None))
        return layouts, margins

    def _observe(self, x: Tensor) -> Observation:
        with torch.no_grad(), ObserveRegion(observe=True) as mode:
            for branch in self.branches:
                branch(self._anchor(x.to(torch.float32)))
        seen: Observation | None = mode.seen
        assert seen is not None
        return seen
