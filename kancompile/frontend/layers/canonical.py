"""Bring a captured layer into canonical form: expansions that feed one contraction.

Every cut of the region becomes a branch: the univariate sub-graph as a module, with a map from (input, function) to the
place of that value in the sub-graph's output, read off the element ids. What lies between the cuts and the target is
affine and becomes the weight matrix and the bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import Axes, Flow, GraphCopier, Selection
from kancompile.frontend.layers.columns import sample_points, sample_tokens
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Contraction, Expansion


@dataclass(frozen=True)
class CanonicalLayer:
    """A layer as modules.

    Attributes:
        region: where it stands in the exported graph.
        anchors: node that each expansion reads.
        selections: which of its elements, ``None`` for all.
        expansions, contraction: the modules.
        order: from what the contraction yields, ``[b, tokens, n_out]``, to the target, ``None`` where these are the same.
        shape: of the target.
        pixel: of a layer over images of a dynamic size, which reads and yields ``[b, channels, *spatial]``: the spatial shape
            that its expansions are of, 1 where that is dynamic; else ``None``.
    """

    region: Region
    anchors: tuple[fx.Node, ...]
    selections: tuple[Selection | None, ...]
    expansions: tuple[Expansion, ...]
    contraction: Contraction
    order: Axes | None = None
    shape: tuple[int, ...] = ()
    pixel: tuple[int, ...] | None = None

    @property
    def any_size(self) -> bool:
        """Whether it reads and yields images of any size."""
        return self.pixel is not None

    def moved(self, y: Tensor) -> Tensor:
        """Bring what the contraction yields, ``[b, *]``, into the order of the target."""
        return y if self.order is None else self.order(y, self.shape)

    def emit_moved(self, copier: GraphCopier, y: fx.Node) -> fx.Node:
        """Append nodes that bring the contraction's outputs into the order of the target."""
        return y if self.order is None else self.order.emit(copier, y, self.contraction.out_shape, self.shape)


def shipped_bytes(layer: CanonicalLayer, levels: int = 256) -> int:
    """Estimate the size of a layer with 8-bit tables and weights, to choose between two places to cut.

    Inputs with the same functions share a table.
    """
    total = layer.contraction.weight.numel()
    for expansion in layer.expansions:
        values = sample_tokens(expansion, sample_points())
        size = values[torch.isfinite(values)].abs().max().clamp(min=1e-12)
        rows = (values / size * 1e4).round().permute(1, 0, 2).flatten(1)
        total += len(torch.unique(rows, dim=0)) * expansion.k * levels
    return total


def positions_of(origin: Tensor, n_elements: int) -> Tensor:
    """Invert ``origin``: int64 ``[n_elements, k]``, places of each element's functions in order, filled up with -1."""
    places = torch.nonzero(origin >= 0).flatten()
    places = places[torch.argsort(origin[places], stable=True)]
    owners = origin[places]
    counts = torch.bincount(owners, minlength=n_elements)
    starts = counts.cumsum(0) - counts
    position = torch.full((n_elements, max(1, int(counts.max()))), -1)
    position[owners, torch.arange(len(owners)) - starts[owners]] = places
    return position


def layer_name(flow: Flow, region: Region) -> str:
    """Name a layer by the innermost module that holds its contractions and its cuts, empty for the model itself.

    Where only the model holds both a layer and a linear map behind it that it has taken up, the layer gives its name.
    """
    nodes = [node for node in region.affine if node in flow.contractions] or [region.target]
    behind: set[fx.Node] = set()
    for node in region.affine:
        sources = flow.data_inputs(node)
        if any(source in behind or source in nodes for source in sources):
            behind.add(node)
    own = [cut for cut in region.cuts if cut not in flow.anchors]
    return _common_module([*nodes, *region.cuts]) or _common_module([*(n for n in nodes if n not in behind), *own])


def _common_module(nodes: Sequence[fx.Node]) -> str:
    paths = [path for node in nodes if (path := _module_path(node)) is not None]
    common = paths[0] if paths else []
    for path in paths:
        common = [
            part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(common, path, strict=False))
        ]
    return ".".join(common)


def _module_path(node: fx.Node) -> list[str] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0]).removeprefix("L['self']").lstrip(".")
    return path.split(".") if path else []
