"""Bring a captured layer into canonical form: expansions that feed one contraction.

Every cut of the region becomes a branch: the univariate sub-graph as a module, with a map from (input, function) to the
place of that value in the sub-graph's output, read off the element ids. What lies between the cuts and the target is
affine and becomes the weight matrix and the bias.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.activations import is_plain_activation
from kancompile.frontend.affine_map import affine_map
from kancompile.frontend.batch_layout import BatchLayout, NotLowerableError, layout_of
from kancompile.frontend.columns import Columns, merge_columns, sample_points, sample_tokens, tokens_are_alike
from kancompile.frontend.flow import Flow
from kancompile.frontend.origins import Cut, locate
from kancompile.frontend.regions import Region
from kancompile.frontend.subgraph import Selection, cut_out, largest_row
from kancompile.ir.contraction import Contraction
from kancompile.ir.convolution import ConvContraction
from kancompile.ir.expansion import Branch, Expansion

_LARGEST_WEIGHT = 1 << 27
"""Most entries of a weight matrix that is written out densely (512 MiB in float32)."""


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
    contraction: Contraction | ConvContraction


def canonicalize(flow: Flow, region: Region, name: str, per_token: bool) -> CanonicalLayer:
    """Build the modules of one layer.

    Args:
        flow: analysis of the network.
        region: the layer.
        name: layer name.
        per_token: treat all but the last dimension of the anchors as tokens, whose map is read off the first one; the
            caller confirms it by evaluation. Otherwise every element of an anchor is an input of its own.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    target = layout_of(region.target, flow.batch)
    cuts = [locate(flow, node) for node in region.cuts]
    lead = _lead(target, [layout_of(cut.anchor, flow.batch) for cut in cuts]) if per_token else ()
    arranged = [_arrange(flow, anchor, cuts, lead) for anchor in dict.fromkeys(cut.anchor for cut in cuts)]
    inputs = [part for part in arranged if part is not None]
    weights, bias = _weights(flow, region, cuts, inputs, target, lead)
    kept, kan = [], False
    for part, weight in zip(inputs, weights, strict=True):
        columns = Columns(part.expansion, weight)
        values = sample_tokens(columns.expansion, sample_points())
        if lead and not tokens_are_alike(columns.expansion):
            raise NotLowerableError("functions differ between tokens")
        merged, shift, values = merge_columns(columns, values, flow.values[part.anchor])
        bias = bias + shift.sum(1)
        if merged is not None:
            kan = kan or is_kan(merged.expansion, values)
            kept.append((part, merged))
    refuse_plain([columns.expansion for _, columns in kept], kan, "linear layer")
    return CanonicalLayer(
        region,
        tuple(part.anchor for part, _ in kept),
        tuple(part.selection for part, _ in kept),
        tuple(columns.expansion for _, columns in kept),
        Contraction(name, torch.cat([columns.weight.flatten(1) for _, columns in kept], dim=1), bias, target.shape),
    )


@dataclass(frozen=True)
class _Inputs:
    """What a layer reads from one anchor; ``cuts`` are the numbers of the region's cuts that became branches."""

    anchor: fx.Node
    selection: Selection | None
    expansion: Expansion
    cuts: tuple[int, ...]


def _arrange(flow: Flow, anchor: fx.Node, cuts: Sequence[Cut], lead: tuple[int, ...]) -> _Inputs | None:
    """Make the cuts of one anchor branches of one expansion, ``None`` where all of them are constant."""
    shape = layout_of(anchor, flow.batch).shape
    size = math.prod(shape) // math.prod(lead)
    own = [number for number, cut in enumerate(cuts) if cut.anchor is anchor]
    positions = [positions_of(cuts[number].origin, math.prod(shape)).reshape(*lead, size, -1) for number in own]
    used = torch.cat([position >= 0 for position in positions], dim=-1).any(-1).reshape(-1, size)
    if not bool(used.any()):
        return None
    if not bool((used == used[:1]).all()):
        raise NotLowerableError("inputs differ between tokens")
    selection = None if bool(used.all()) else Selection(lead, size, torch.nonzero(used[0]).flatten())
    branches = []
    for number, position in zip(own, positions, strict=True):
        node = cuts[number].node
        if selection is not None:
            position = position[..., selection.used, :]
        if node is anchor:
            position = torch.arange(position.numel()).reshape(position.shape)
        inner = None if node is anchor else cut_out(flow, [anchor], node, selection)
        branches.append(Branch(node.name, inner, position))
    read = shape if selection is None else selection.shape
    return _Inputs(anchor, selection, Expansion(read, branches), tuple(own))


def _weights(
    flow: Flow,
    region: Region,
    cuts: Sequence[Cut],
    inputs: Sequence[_Inputs],
    target: BatchLayout,
    lead: tuple[int, ...],
) -> tuple[list[Tensor], Tensor]:
    """Read the affine map off the graph: weights ``[n_out, n_in, k]`` of each expansion, and the bias with all constants."""
    tokens = math.prod(lead)
    places: dict[int, Tensor] = {}  # cut -> [tokens, n_in, k]
    for part in inputs:
        for number, branch in zip(part.cuts, part.expansion.branches, strict=True):
            assert isinstance(branch, Branch)
            position = branch.position
            if cuts[number].node is part.anchor and part.selection is not None:
                whole = torch.arange(cuts[number].origin.numel()).reshape(*lead, -1, 1)
                position = whole[..., part.selection.used, :]
            places[number] = position.reshape(tokens, *position.shape[-2:])
    nothing = torch.empty(tokens, 0, dtype=torch.int64)
    columns = [places[n].clamp(min=0).flatten(1) if n in places else nothing for n in range(len(cuts))]
    n_out = math.prod(target.shape) // tokens
    n_columns = sum(part.shape[1] for part in columns)
    if n_out * n_columns > _LARGEST_WEIGHT:
        raise NotLowerableError(f"a dense matrix of {n_out} x {n_columns} weights would be too large")
    base = [torch.zeros(cut.layout.shape) for cut in cuts]
    for value, cut in zip(base, cuts, strict=True):
        value.view(-1)[cut.origin < 0] = cut.constants
    row_elements = largest_row(flow, [*region.affine, *region.cuts])
    matrices, bias = affine_map(cut_out(flow, region.cuts, region.target), base, columns, n_out, row_elements)
    weights = []
    for part in inputs:
        first = [(matrices[number], places[number][0]) for number in part.cuts]
        weights.append(torch.cat([(m.reshape(n_out, *p.shape)) * (p >= 0) for m, p in first], dim=-1))
    return weights, bias


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


def can_be_per_token(flow: Flow, region: Region) -> bool:
    """Whether shapes allow that a layer treats leading dimensions as tokens."""
    try:
        layouts = [layout_of(flow.track(node).anchor, flow.batch) for node in region.cuts]
        return bool(_lead(layout_of(region.target, flow.batch), layouts))
    except NotLowerableError:
        return False


def refuse_plain(expansions: Sequence[Expansion], kan: bool, what: str) -> None:
    """Refuse a layer that is no KAN layer.

    Args:
        expansions: what it reads, parts that carry nothing left out.
        kan: whether one of them is more than an activation.
        what: the layer, in words.

    Raises:
        NotLowerableError: it reads features themselves, or plain activations of them.
    """
    if all(expansion.is_identity for expansion in expansions):
        raise NotLowerableError(f"plain {what}")
    if not kan:
        raise NotLowerableError(f"{what} after a plain activation")


def refuse_other_layers(flow: Flow, region: Region) -> None:
    """Leave out what this form cannot hold.

    Raises:
        NotLowerableError: a plain linear layer, other number types.
    """
    if all(node in flow.anchors for node in region.cuts):
        raise NotLowerableError("plain linear layer")
    for node in (*region.cuts, region.target, *(flow.track(cut).anchor for cut in region.cuts)):
        if flow.values[node].dtype != torch.float32:
            raise NotLowerableError(f"computes in {flow.values[node].dtype}, not in float32")


def _lead(target: BatchLayout, anchors: Sequence[BatchLayout]) -> tuple[int, ...]:
    """Leading dimensions that the anchors and the target share, dimensions of size 1 aside."""
    shapes = [[size for size in layout.shape if size != 1] for layout in anchors]
    lead = shapes[0][:-1]
    if any(shape[:-1] != lead for shape in shapes) or list(target.shape[: len(lead)]) != lead:
        return ()
    return tuple(lead)


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


def is_kan(expansion: Expansion, values: Tensor) -> bool:
    """Tell a learnable or manifold expansion from the activation of an ordinary network.

    Several functions of one input, functions that differ between inputs, or one function that is no standard activation.
    """
    if expansion.k >= 2:
        return True
    if expansion.is_identity:
        return False
    functions = values.flatten(1)  # [points, inputs]
    if not torch.allclose(functions, functions[:, :1], rtol=1e-5, atol=1e-6):
        return True
    return not is_plain_activation(sample_points(), functions[:, 0])


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
