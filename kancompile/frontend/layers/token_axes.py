"""Find the axes along which a layer is the same everywhere: tokens, pixels, or the channels beside the tokens that a mixer mixes.

Whatever stands between functions and target is linear. So values ``v`` of the functions and the same values times the number
of their place along an axis, ``j v``, tell of every output whether all that it adds up stands at one place: then the second
result is ``j`` times the first. An axis is not mixed where that holds for every output, and ``j`` says where along the target
its places went. That takes two evaluations for an axis, whatever the size of the layer, and no shape is taken for more than it
is.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import Axes, Cut, Flow, cut_out, layout_of, operator_name
from kancompile.frontend.layers.regions import Region

_DRAWS = 4
"""Values for which outputs are compared; of one, an output may be close to 0."""
_TOLERANCE = 1e-3
_UNKNOWN = -1.0
"""Place of an output that adds up nothing of an anchor."""


@dataclass(frozen=True)
class TokenAxes:
    """How a layer that has the same map for every token finds tokens and features in its tensors.

    Attributes:
        lead: sizes of the axes of tokens, as all expansions yield them.
        channels_first: whether expansions read anchors as they are, features in front of all axes of tokens.
        anchors: order in which each anchor is read, tokens first.
        target: order of the outputs, tokens first.
    """

    lead: tuple[int, ...]
    channels_first: bool
    anchors: Mapping[fx.Node, Axes]
    target: Axes

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return math.prod(self.lead)


def find_tokens(flow: Flow, region: Region, cuts: Sequence[Cut]) -> TokenAxes | None:
    """Find the axes of a layer's anchors and of its target that the layer does not mix.

    Args:
        flow: analysis of the network.
        region: the layer.
        cuts: where the elements of the region's cuts come from.

    Returns:
        the axes, ``None`` where an anchor has no such axis, or not the same as another one.

    Raises:
        NotLowerableError: the layer cannot be evaluated alone.
    """
    whole = {cut.anchor: layout_of(cut.anchor, flow.batch).shape for cut in cuts}
    target = layout_of(region.target, flow.batch).shape
    shapes = {anchor: _as_viewed(flow, anchor, shape) for anchor, shape in whole.items()}
    if any(sum(size > 1 for size in shape) < 2 for shape in shapes.values()):
        return None
    places = _places(flow, region, cuts, shapes)
    if not all(places.values()):
        return None
    rows = torch.stack([row for own in places.values() for row in own.values()])
    sizes, tokens = _split(rows.reshape(len(rows), *target))
    order = [*tokens, *(axis for axis in range(len(sizes)) if axis not in tokens)]
    count = math.prod(sizes[axis] for axis in tokens)
    anchors: dict[fx.Node, list[int]] = {}
    for anchor, own in places.items():
        of_tokens = {
            axis: row.reshape(sizes).permute(order).reshape(count, -1).amax(1).long() for axis, row in own.items()
        }
        found = _order(of_tokens, shapes[anchor], count)
        if found is None:
            return None
        anchors[anchor] = found
    return _token_axes(whole, shapes, anchors, Axes.joined(sizes, order), count)


def _token_axes(
    whole: Mapping[fx.Node, tuple[int, ...]],
    shapes: Mapping[fx.Node, tuple[int, ...]],
    tokens: Mapping[fx.Node, list[int]],
    target: Axes,
    count: int,
) -> TokenAxes:
    """Choose how expansions read their anchors: as these are if all are alike, else reordered to ``[tokens, features]``."""
    orders, leads, first = {}, set(), set()
    for anchor, axes in tokens.items():
        shape = shapes[anchor]
        features = [axis for axis in range(len(shape)) if axis not in axes]
        orders[anchor] = Axes.joined(shape, [*axes, *features])
        channels, *others = whole[anchor]
        moved = not orders[anchor].stays and orders[anchor] == Axes.joined((channels, math.prod(others)), (1, 0))
        first.add(moved)
        leads.add(tuple(others) if moved else tuple(shape[axis] for axis in axes))
    if len(leads) == 1 and first == {True}:
        return TokenAxes(leads.pop(), True, orders, target)
    plain = len(leads) == 1 and all(axes.stays for axes in orders.values())
    return TokenAxes(leads.pop() if plain else (count,), False, orders, target)


def _as_viewed(flow: Flow, anchor: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Split the axes of an anchor as the network's own views of it do: a flat image into rows, an image into windows."""
    inside, views = {anchor}, [shape]
    for node in flow.graph.nodes:
        if operator_name(node) in ("view", "_unsafe_view", "reshape") and node.args[0] in inside:
            inside.add(node)
            views.append(layout_of(node, flow.batch).shape)
    split: list[int] = []
    ends = sorted({end for view in views for end in itertools.accumulate(view, operator.mul)})
    for start, end in itertools.pairwise([1, *ends]):
        if end % start:  # views that cut across each other
            return shape
        split.append(end // start)
    return tuple(split)


def _places(
    flow: Flow, region: Region, cuts: Sequence[Cut], shapes: Mapping[fx.Node, tuple[int, ...]]
) -> dict[fx.Node, dict[int, Tensor]]:
    """Give for every axis of an anchor that is not mixed at which of its places outputs stand, ``[outputs]``, or unknown."""
    module = cut_out(flow, region.cuts, region.target)
    generator = torch.Generator().manual_seed(4)
    base, drawn = [cut.base() for cut in cuts], []
    for cut in cuts:
        noise = torch.randn(_DRAWS, *cut.layout.shape, generator=generator)
        drawn.append(noise * (cut.origin >= 0).reshape(cut.layout.shape))

    def outputs(factors: Sequence[Tensor | float]) -> Tensor:
        """Evaluate the layer for the drawn values times factors, ``[draws, outputs]``."""
        with torch.no_grad():
            y: Tensor = module(*(b + d * f for b, d, f in zip(base, drawn, factors, strict=True)))
        return y.flatten(1).double()

    constant = outputs([0.0] * len(cuts))
    found: dict[fx.Node, dict[int, Tensor]] = {}
    for anchor, shape in shapes.items():
        own = [float(cut.anchor is anchor) for cut in cuts]
        whole = outputs(own) - constant
        size = whole.square().sum(0).sqrt()
        known = size > _TOLERANCE * size.max()
        found[anchor] = {}
        for axis, numbers in _numbers(shape):
            of_cuts = [
                numbers[cut.origin.clamp(min=0)].reshape(cut.layout.shape) for cut in cuts if cut.anchor is anchor
            ]
            scaled = outputs([of_cuts.pop(0) if factor else 0.0 for factor in own]) - constant
            place = ((whole * scaled).sum(0) / size.square().clamp(min=1e-30)).round()
            rest = (scaled - place * whole).square().sum(0).sqrt()
            at_one_place = bool((rest <= _TOLERANCE * shape[axis] * size)[known].all())
            if at_one_place and len(torch.unique(place[known])) == shape[axis]:
                found[anchor][axis] = torch.where(known, place, _UNKNOWN)
    return found


def _numbers(shape: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Give for every axis that is one the place of all elements along it."""
    for axis, size in enumerate(shape):
        if size > 1:
            view = [size if other == axis else 1 for other in range(len(shape))]
            yield axis, torch.arange(float(size)).view(view).expand(*shape).flatten()


def _split(places: Tensor) -> tuple[tuple[int, ...], list[int]]:
    """Split the axes of outputs into those of tokens and others.

    Args:
        places: ``[rows, *shape]``, places along axes of anchors.

    Returns:
        sizes of the axes, and which of them are those of tokens: along the others, places stay the same.
    """
    sizes: list[int] = []
    tokens: list[int] = []
    for axis, size in enumerate(places.shape[1:], start=1):
        along = places.movedim(axis, 0).reshape(size, -1)
        runs = next(r for r in _divisors(size)[::-1] if _is_constant(along.reshape(size // r, r, -1), 1))
        ends = along.reshape(size // runs, runs, -1).amax(1)
        period = next(p for p in _divisors(len(ends)) if _is_constant(ends.reshape(-1, p, ends.shape[1]), 0))
        if period > 1:
            tokens.append(len(sizes) + 1)
            sizes += [size // runs // period, period, runs]
        else:
            sizes.append(size)
    return tuple(sizes), tokens


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def _is_constant(places: Tensor, dim: int) -> bool:
    """Whether places are the same along a dimension, unknown ones aside."""
    lowest = torch.where(places == _UNKNOWN, math.inf, places).amin(dim)
    return bool((places.amax(dim) <= lowest).all())


def _order(places: Mapping[int, Tensor], shape: Sequence[int], count: int) -> list[int] | None:
    """Give the order of an anchor's axes in which it counts the tokens as the target does, ``None`` where there is none."""
    if math.prod(shape[axis] for axis in places) != count:
        return None
    for order in itertools.permutations(places):
        number = torch.zeros(count, dtype=torch.int64)
        for axis in order:
            number = number * shape[axis] + places[axis]
        if torch.equal(number, torch.arange(count)):
            return list(order)
    return None
