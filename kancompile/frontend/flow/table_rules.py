"""What lookups and writes at computed places do to element ids: gather, index, embedding, scatter and their like.

An index is a function of data like any other, so what it picks from a constant table depends on what it depends on. Where
it points on the example says nothing about other inputs: a data-dependent table, and a tensor that is written to, count
with every element that the bounds of the index let it reach.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow.verdicts import CONSTANT, LARGEST, Call, Follows, Mixes, Stops, Verdict, combine

_MOST_PLACES = 1 << 16
"""Combinations of index values that are followed; more say that nothing bounds the index."""
_MISSED = re.compile(r"out of (\w+ )?(bounds|range)")


def misses_table(error: Exception) -> bool:
    """Whether an operator fails because an index points beyond its table."""
    return _MISSED.search(str(error)) is not None


@dataclass(frozen=True)
class _Places:
    """Where a call reads or writes, as ``table[picks]``.

    Attributes:
        shape: of the table.
        picks: for each of its first dimensions an index, ``None`` for all of it.
        data: the node of each index that depends on data, else ``None``.
        wraps: whether negative numbers count from the end.
    """

    shape: torch.Size
    picks: tuple[Tensor | None, ...]
    data: tuple[fx.Node | None, ...]
    wraps: bool

    def positions(self, picks: tuple[Tensor | None, ...]) -> Tensor:
        """Number the elements of the table that are read or written."""
        numbers = torch.arange(self.shape.numel()).view(self.shape)
        return numbers[tuple(slice(None) if pick is None else pick for pick in picks)]

    def ids(self, call: Call) -> list[Tensor]:
        """Give the ids of every data-dependent index, in a shape that expands to that of the positions."""
        used = [dim for dim, pick in enumerate(self.picks) if pick is not None]
        together = used[-1] - used[0] == len(used) - 1
        common = torch.broadcast_shapes(*(pick.shape for pick in self.picks if pick is not None))
        behind = len(self.shape) - len(used) - (used[0] if together else 0)
        parts = [call.tracks[node].ids for node in self.data if node is not None]
        return [ids.broadcast_to(common).reshape(*common, *[1] * behind) for ids in parts]

    def reachable(self, call: Call) -> Iterator[Tensor] | None:
        """Number what may be read or written, for one combination of index values after the other.

        Returns:
            the positions, or ``None`` where nothing bounds an index of a large table.
        """
        ranges = []
        for dim, node in enumerate(self.data):
            if node is not None:
                low, high = call.bounds(node)
                size = self.shape[dim]
                limits = (-size if self.wraps else 0, size - 1)
                ranges.append((dim, low.clamp(*limits).long(), high.clamp(*limits).long()))
        widths = [int((high - low).max()) + 1 for _, low, high in ranges]
        if math.prod(widths) > _MOST_PLACES:
            return None

        def positions(offsets: tuple[int, ...]) -> Tensor:
            picks = list(self.picks)
            for (dim, low, high), offset in zip(ranges, offsets, strict=True):
                picks[dim] = torch.minimum(low + offset, high)
            return self.positions(tuple(picks))

        return map(positions, itertools.product(*map(range, widths)))


def _places(call: Call) -> _Places:
    table = call.args[0]
    if call.name in ("index", "index_put"):
        nodes, picks = call.node.args[1], call.args[1]
        assert isinstance(nodes, list | tuple)
    elif call.name == "embedding":
        nodes, picks = [call.node.args[1]], [call.args[1]]
    else:
        dim, index = call.args[1] % table.dim(), call.args[2]
        if call.name == "index_select":
            picks = [None] * dim + [index.reshape(-1)]
        else:
            grid = torch.meshgrid(*map(torch.arange, index.shape), indexing="ij")
            picks = [*grid[:dim], index, *grid[dim + 1 :]]
        nodes = [call.node.args[2] if place == dim else None for place in range(len(picks))]
    data = tuple(node if isinstance(node, fx.Node) and node in call.tracks else None for node in nodes)
    return _Places(table.shape, tuple(picks), data, wraps=call.name in ("index", "index_put"))


def read(call: Call) -> Verdict:
    """Gather, index, index_select and embedding: a function of the index and of all that it could pick."""
    if not call.one_anchor:
        return Stops("lookup in values of another origin")
    if call.name == "index" and _has_mask(call):
        return Stops("picks as many elements as a mask has")
    places = _places(call)
    ids: Tensor | None = combine(places.ids(call), call.value.shape)
    if ids is None:
        return Stops("index made of several features")
    source = call.ids(0)
    if source is None:
        return Follows(ids, linear=False)
    reachable = places.reachable(call)
    for positions in reachable or ():
        ids = combine([ids, source.flatten()[positions]], ids.shape)
        if ids is None:
            break
    if reachable is None or ids is None:
        return Stops("lookup that may pick values of several features")
    return Follows(ids, linear=False)


def write(call: Call) -> Verdict:
    """scatter, scatter_add, scatter_reduce and index_put: every element is a function of what may be put there.

    Adding at constant places is a sum, and so a contraction where several elements meet.
    """
    if call.name == "index_put" and _has_mask(call):
        return _masked(call)
    places = _places(call)
    sums = (
        call.name == "scatter_add"
        or (call.name == "index_put" and call.argument(3, False))
        or (call.name == "scatter_reduce" and call.args[4] == "sum")
    )
    linear = sums and not any(places.data) and call.value.is_floating_point()
    if not call.one_anchor:
        return Mixes(contraction=False) if linear else Stops("writes values of another origin")
    several = (
        Mixes(contraction=True) if linear else Stops("writes that may put values of several features in one place")
    )
    put = call.ids(2 if call.name == "index_put" else 3)
    parts = places.ids(call)
    shape = places.positions(places.picks).shape
    if put is not None:
        parts.append(put if call.name == "index_put" else put[tuple(map(slice, shape))])
    ids = combine(parts, shape) if parts else torch.full(shape, CONSTANT)
    reachable = places.reachable(call)
    if ids is None or reachable is None:
        return several
    before = call.ids(0)
    before = torch.full(places.shape, CONSTANT) if before is None else before
    highest, lowest = before.flatten().clone(), torch.where(before < 0, LARGEST, before).flatten()
    least = torch.where(ids < 0, LARGEST, ids)
    for positions in reachable:
        highest.scatter_reduce_(0, positions.flatten(), ids.flatten(), "amax")
        lowest.scatter_reduce_(0, positions.flatten(), least.flatten(), "amin")
        if bool(((highest >= 0) & (highest != lowest)).any()):
            return several
    return Follows(highest.view(places.shape), linear)


def _has_mask(call: Call) -> bool:
    return any(pick is not None and pick.dtype == torch.bool for pick in call.args[1])


def _masked(call: Call) -> Verdict:
    """Put one value wherever a mask holds."""
    mask = call.node.args[1]
    assert isinstance(mask, list | tuple)
    if len(mask) != 1 or call.args[2].numel() != 1 or call.argument(3, False):
        return Stops("writes at as many places as a mask has")
    if not call.one_anchor:
        return Stops("writes values of another origin")
    parts = [ids for ids in (call.ids(0), call.ids(2)) if ids is not None]
    if isinstance(mask[0], fx.Node) and mask[0] in call.tracks:
        own = call.tracks[mask[0]].ids
        parts.append(own.reshape(*own.shape, *[1] * (call.value.dim() - own.dim())))
    ids = combine(parts, call.value.shape)
    return Stops("writes that may put values of several features in one place") if ids is None else Follows(ids, False)
