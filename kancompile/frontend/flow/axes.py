"""A tensor's elements in another order of its axes, on tensors and in graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow.subgraph import GraphCopier, Selection

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Axes:
    """An order in which to read the elements of one sample.

    Attributes:
        sizes: axes that the sample can be viewed as.
        order: number of the axis that comes first, second and so on.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def joined(cls, sizes: Sequence[int], order: Sequence[int]) -> Axes:
        """Join axes that stay side by side, and leave out those of size 1."""
        groups: list[list[int]] = []
        last = -1
        for axis in order:
            if sizes[axis] == 1:
                continue
            between = sizes[last + 1 : axis] if groups and last < axis else (0,)
            if math.prod(between) == 1:
                groups[-1].append(axis)
            else:
                groups.append([axis])
            last = axis
        in_place = sorted(range(len(groups)), key=lambda number: groups[number][0])
        return cls(
            tuple(math.prod(sizes[axis] for axis in groups[number]) for number in in_place),
            tuple(in_place.index(number) for number in range(len(groups))),
        )

    @property
    def stays(self) -> bool:
        """Whether elements stay where they are."""
        return self.order == tuple(sorted(self.order))

    @property
    def inverse(self) -> Axes:
        """The way back."""
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return Axes(tuple(self.sizes[axis] for axis in self.order), back)

    def __call__(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Reorder ``[b, ...]`` to ``[b, *shape]``."""
        if not self.stays:
            x = x.reshape(-1, *self.sizes).permute(0, *(1 + axis for axis in self.order))
        return x.reshape(-1, *shape)

    def emit(self, copier: GraphCopier, node: fx.Node, read: Sequence[int], shape: Sequence[int]) -> fx.Node:
        """Append nodes that reorder ``node``, ``[b, *read]``, to ``[b, *shape]``."""
        graph, now = copier.graph, tuple(read)
        if not self.stays:
            if now != self.sizes:
                node = graph.call_function(_ATEN.reshape.default, (node, [copier.rows, *self.sizes]))
            node = graph.call_function(_ATEN.permute.default, (node, [0, *(1 + axis for axis in self.order)]))
            now = tuple(self.sizes[axis] for axis in self.order)
        if now != tuple(shape):
            node = graph.call_function(_ATEN.reshape.default, (node, [copier.rows, *shape]))
        return node


@dataclass(frozen=True)
class ReorderedSelection(Selection):
    """Some of the inputs ``[b, *lead, n]`` of a layer, or all, where a tensor holds them in another order.

    Attributes:
        axes: brings the tensor to ``[b, *lead, n]``.
    """

    axes: Axes

    def __call__(self, x: Tensor) -> Tensor:
        """Select from ``[b, ...]``: ``[b, *lead, len(used)]``."""
        return self.axes(x, (*self.lead, self.size))[..., self.used]

    def emit(self, copier: GraphCopier, node: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
        """Append nodes that select from ``node``, ``[b, *shape]``."""
        node = self.axes.emit(copier, node, shape, (*self.lead, self.size))
        return node if len(self.used) == self.size else self._emit_pick(copier, node, name)

    def emit_spread(self, copier: GraphCopier, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Append nodes that put selected elements back to their places in ``[b, *shape]``."""
        ordered = (*self.lead, self.size)
        if len(self.used) < self.size:
            node = super().emit_spread(copier, node, ordered)
        return self.axes.inverse.emit(copier, node, ordered, shape)
