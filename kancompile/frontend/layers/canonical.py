"""Bring a captured layer into canonical form: expansions that feed one contraction.

Every cut of the region becomes a branch: the univariate sub-graph as a module, with a map from (input, function) to the
place of that value in the sub-graph's output, read off the element ids. What lies between the cuts and the target is
affine and becomes the weight matrix and the bias.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import Flow, Selection
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
    """

    region: Region
    anchors: tuple[fx.Node, ...]
    selections: tuple[Selection | None, ...]
    expansions: tuple[Expansion, ...]
    contraction: Contraction


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
    """Name a layer by the innermost module that holds its contractions and its cuts, empty for the model itself."""
    nodes = [node for node in region.affine if node in flow.contractions] or [region.target]
    paths = [path for node in (*nodes, *region.cuts) if (path := _module_path(node)) is not None]
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
