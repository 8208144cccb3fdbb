"""Which linear maps behind functions become part of their layer, and which stay behind it.

A contraction that reads another one can be multiplied into it: ``V (W phi)`` is ``(V W) phi``, one layer. That saves work where
``V`` has few rows, such as a head behind a wide layer. A depthwise convolution, a mean over tokens or a wide map behind a narrow
layer makes a far larger layer of the two. Both ways are tried, and what costs less is taken; a way that loses a KAN layer is
none. So does a sum of layers over different axes, ``a(x) + b(x^T)^T``, whose only common form mixes both: where a layer is larger
than the model's own weights, the terms are tried apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from kancompile.errors import reason
from kancompile.frontend.flow import Flow, NotLowerableError, operator_name
from kancompile.frontend.layers.canonical import CanonicalLayer, layer_name
from kancompile.frontend.layers.forms import best_layer
from kancompile.frontend.layers.pixelwise_map import LARGEST_WEIGHT
from kancompile.frontend.layers.recognition import PlainLayerError
from kancompile.frontend.layers.regions import Region, Search

_PRODUCT, _BYTE, _ELEMENT, _LAYER = 0.0053, 2.0, 1.0, 6000.0
"""Nanoseconds of ONNX Runtime for an 8-bit product, for what a layer hands over and for the nodes of a layer, as
``passes.reduce_functions.look_up_time`` has them, and how much of that a byte of a file is worth: as much as half a megabyte a
millisecond."""
_MERGED = 4
"""How many times the weights that would be as dear as a chain are written out to see whether merging saves functions."""
_ENLARGED = 2
"""How many times the model's own weights a layer may have before the terms of its sum are tried as layers of their own."""
_DEPTH, _WIDTH = 4, 16
"""Integer kernels fill the sum of a product and its outputs up to multiples of these."""


@dataclass(frozen=True)
class Found:
    """The layers of a network, or of a part of it.

    Attributes:
        search: where layers end.
        layers: the KAN layers, in order of evaluation.
        refused: other contractions, and why they are no such layer.
        lost: how many of those hold functions that an ordinary layer has not.
        cost: nanoseconds for a sample, with what bytes are worth.
    """

    search: Search
    layers: tuple[CanonicalLayer, ...] = ()
    refused: tuple[tuple[fx.Node, str], ...] = ()
    lost: int = 0
    cost: float = 0.0

    def __add__(self, other: Found) -> Found:
        return Found(
            other.search,
            (*self.layers, *other.layers),
            (*self.refused, *other.refused),
            self.lost + other.lost,
            self.cost + other.cost,
        )


def find_layers(flow: Flow) -> Found:
    """Find the KAN layers of a network and bring them into canonical form."""
    found = Found(Search(flow))
    for target in found.search.targets():
        found += _resolve(found.search, target, found.layers)
    return found


def _resolve(search: Search, target: fx.Node, before: tuple[CanonicalLayer, ...]) -> Found:
    """Find the layers of which a target is the last one; ``before`` are those whose names are taken."""
    candidates = search.cut(target)
    if not candidates or not search.is_layer(candidates[0]):
        return Found(search)
    region = candidates[0]
    divided = search.divided(region)
    if divided is None:
        found = _merged(search, candidates, before)
    else:
        chain = _pieces(divided, region, before)
        complete = bool(chain.layers) and not chain.lost
        if complete and _repeats_weights(search.flow, region):
            return chain
        largest = int(_MERGED * chain.cost / _BYTE) if complete else LARGEST_WEIGHT
        found = _cheaper(_merged(search, candidates, before, min(largest, LARGEST_WEIGHT)), chain)
    written = sum(layer.contraction.weight.numel() for layer in found.layers)
    if found.lost or written > _ENLARGED * _weights(search.flow, region):
        parted = search.parted(region)
        if parted is not None:
            return _cheaper(found, _pieces(parted, region, before))
    return found


def _pieces(search: Search, region: Region, before: tuple[CanonicalLayer, ...]) -> Found:
    """Find the layers of a region by a search in which it ends in several places."""
    found = Found(search)
    for node in region.affine:
        if node is region.target or search.is_target(node):
            found += _resolve(found.search, node, (*before, *found.layers))
    return found


def _cheaper(merged: Found, pieces: Found) -> Found:
    better = bool(pieces.layers) and (pieces.lost, pieces.cost) < (merged.lost, merged.cost)
    return pieces if better else merged


def _repeats_weights(flow: Flow, region: Region) -> bool:
    """Whether contractions of a region share weights, as steps of a loop do: one layer of all would hold them many times."""
    stored = [factor.untyped_storage().data_ptr() for factor in _factors(flow, region) if factor.dim() > 1]
    return len(set(stored)) < len(stored)


def _weights(flow: Flow, region: Region) -> int:
    """Count the numbers that the contractions of a region multiply by."""
    return sum(factor.numel() for factor in {id(factor): factor for factor in _factors(flow, region)}.values())


def _factors(flow: Flow, region: Region) -> list[Tensor]:
    """List the constant tensors that the contractions of a region read."""
    read = [factor for node in region.affine if node in flow.contractions for factor in flow.factors(node)]
    return [factor for factor in read if isinstance(factor, Tensor)]


def _merged(
    search: Search, candidates: Sequence[Region], before: tuple[CanonicalLayer, ...], largest: int = LARGEST_WEIGHT
) -> Found:
    """Make one layer of everything between functions and a target."""
    flow, region = search.flow, candidates[0]
    try:
        layer = best_layer(flow, candidates, _unique(layer_name(flow, region), before), largest)
    except (IndexError, RuntimeError) as error:  # of the user's operators, such as an embedding of whole floats
        text = f"its functions fail on other values than the samples' ({reason(error)})"
        return Found(search, (), ((region.target, text),), 1, _cost_of_operators(flow, region))
    except NotLowerableError as refusal:
        lost = not isinstance(refusal, PlainLayerError)
        return Found(search, (), ((region.target, str(refusal)),), int(lost), _cost_of_operators(flow, region))
    return Found(search, (layer,), (), 0, _cost(layer))


def _unique(name: str, layers: Sequence[CanonicalLayer]) -> str:
    taken = {layer.contraction.layer for layer in layers}
    name = name or f"layer{len(layers)}"
    candidate, copy = name, 1
    while candidate in taken:
        candidate, copy = f"{name}_{copy}", copy + 1
    return candidate


def _cost(layer: CanonicalLayer) -> float:
    contraction = layer.contraction
    places = math.prod(contraction.out_shape) // contraction.n_out
    sum_of, rows = contraction.products, contraction.n_out // contraction.groups
    return _cost_of_map(sum_of, rows, contraction.groups, places) + _ELEMENT * places * contraction.n_out


def _cost_of_operators(flow: Flow, region: Region) -> float:
    """Estimate what contractions cost that stay ordinary ones."""
    samples = flow.rows
    total = 0.0
    for node in region.affine:
        if node not in flow.contractions:
            continue
        outputs = flow.values[node].numel() // samples
        factors = flow.factors(node)
        total += _ELEMENT * outputs
        if operator_name(node) == "convolution":
            groups = node.args[8]
            assert isinstance(groups, int)
            rows = len(factors[0]) // groups
            total += _cost_of_map(factors[0][0].numel(), rows, groups, outputs // len(factors[0]))
        elif operator_name(node) in ("mm", "addmm", "bmm", "baddbmm"):
            matrix = max(factors, key=lambda factor: factor.dim())
            n_out = max(1, flow.values[node].shape[-1])
            total += _cost_of_map(matrix.numel() // n_out, n_out, 1, max(1, outputs // n_out))
        else:  # a sum, a mean, a pooling: no weights
            total += _ELEMENT * sum(flow.values[source].numel() for source in flow.data_inputs(node)) / samples
    return total


def _cost_of_map(sum_of: int, rows: int, groups: int, places: int) -> float:
    """Estimate a map of ``groups`` matrices ``[rows, sum_of]`` that is applied at so many places."""
    padded = -(-sum_of // _DEPTH) * _DEPTH * -(-rows // _WIDTH) * _WIDTH if groups == 1 else sum_of * rows
    return _LAYER + _BYTE * sum_of * rows * groups + _PRODUCT * padded * groups * places
