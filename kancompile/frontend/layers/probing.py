"""Confirm by evaluation what the analysis claims about one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kancompile.frontend.flow import Flow, NotLowerableError, cut_out, layout_of, whole_image
from kancompile.frontend.layers.canonical import CanonicalLayer
from kancompile.ir import Contraction, Expansion

TOLERANCE = 1e-5
_PROBED_ELEMENTS = 1 << 18
"""Elements of the random part of a probe; large layers are probed with fewer rows, at least two."""
_EDGES = (0.0, 1.0, -1.0, 0.5, -0.5, 2.2, -2.2, 5.0, -5.0, 20.0, -20.0)


def confirm(flow: Flow, layer: CanonicalLayer, rows: int = 16) -> None:
    """Compare a canonical layer with the part of the graph that it replaces, and check that its expansions are univariate.

    Inputs: what the anchors hold on the example, random rows, and rows of edge values.

    Raises:
        NotLowerableError: an output differs by more than 1e-5 of the size of its terms, an input moves functions of
            another one, or a function depends on where its input stands in the tensor.
    """
    generator = torch.Generator().manual_seed(1)
    elements = max(flow.values[anchor].numel() // flow.rows for anchor in layer.anchors)
    rows = max(2, min(rows, _PROBED_ELEMENTS // elements))
    inputs = [_inputs(flow, layer, position, rows, generator) for position in range(len(layer.anchors))]
    original = cut_out(flow, layer.anchors, layer.region.target, images=layer.any_size)
    with torch.no_grad():
        expected = original(*inputs).flatten(1)
        inputs = [
            x if selection is None else x[:, selection.used] if layer.any_size else selection(x)
            for x, selection in zip(inputs, layer.selections, strict=True)
        ]
        features = [expansion(x) for expansion, x in zip(layer.expansions, inputs, strict=True)]
        found = layer.moved(layer.contraction(*features)).flatten(1)
        sizes = layer.moved(sizes_of_terms(layer.contraction, features))
    finite = torch.isfinite(expected).all(1)
    for feature in features:
        finite &= torch.isfinite(feature).flatten(1).all(1)
    if not bool(finite.any()):
        raise NotLowerableError("probing: the layer gives no finite output")
    scale = sizes.reshape(expected.shape)[finite].amax(1, keepdim=True)
    difference = (found - expected)[finite].abs() / scale.clamp(min=1e-30)
    if not bool((difference <= TOLERANCE).all()):
        raise NotLowerableError(
            f"probing: the canonical layer differs from the original by {float(difference.max()):.2g} of its terms"
        )
    for expansion, x, feature in zip(layer.expansions, inputs, features, strict=True):
        _confirm_univariate(expansion, x[finite], feature[finite], generator)


def sizes_of_terms(contraction: Contraction, features: Sequence[Tensor]) -> Tensor:
    """Give the sum of the magnitudes of the terms of every output."""
    sizes = contraction.with_weight(contraction.weight.abs(), contraction.bias.abs())
    total: Tensor = sizes(*(feature.abs() for feature in features))
    return total


def _inputs(flow: Flow, layer: CanonicalLayer, position: int, rows: int, generator: torch.Generator) -> Tensor:
    anchor = layer.anchors[position]
    layout = layout_of(anchor, flow.batch)
    value = flow.values[anchor]
    seen = whole_image(value, layout) if layer.any_size else layout.to_samples(value)
    drawn = 2 * torch.randn(rows, *seen.shape[1:], generator=generator)
    edges = torch.tensor(_EDGES)
    picked = torch.randint(len(_EDGES), drawn.shape, generator=generator)
    return torch.cat([seen, drawn, edges[picked]])


def _confirm_univariate(expansion: Expansion, x: Tensor, feature: Tensor, generator: torch.Generator) -> None:
    """Move one input of each row: only its functions may change; fill a tensor with one value: they must not."""
    elements = feature.flatten(1, -2)  # [rows, inputs, k]
    rows, n_inputs = elements.shape[:2]
    moved = torch.randint(n_inputs, (rows,), generator=generator)
    every = torch.arange(rows)
    numbers = torch.arange(n_inputs).reshape(x.shape[1:])  # the anchor's elements
    element = (numbers.movedim(0, -1) if expansion.channels_first else numbers).flatten()[moved]
    changed = x.flatten(1).clone()
    changed[every, element] += 0.37
    with torch.no_grad():
        other = expansion(changed.reshape(x.shape)).flatten(1, -2)
        filled = expansion.sample(x.flatten(1)[every, element], x.shape[1:]).flatten(1, -2)
    differs = ~torch.isclose(other, elements, rtol=TOLERANCE, atol=1e-7).all(-1)
    differs[every, moved] = False
    if bool(differs.any()):
        raise NotLowerableError("probing: functions of one input depend on another input")
    if not torch.allclose(filled[every, moved], elements[every, moved], rtol=TOLERANCE, atol=1e-6):
        raise NotLowerableError("probing: functions depend on more than the value of their input")
