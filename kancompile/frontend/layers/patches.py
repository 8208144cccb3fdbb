"""Bring a layer that cuts its images into patches before its functions into the form of a convolution.

    y[o, p] = sum over c, t, k of W[o, (c, t), k] * phi_k(x at pixel p + t of channel c)

is a convolution of ``phi_k(x)`` if the functions of a channel are the same at all places ``t`` of a patch: the functions are
then evaluated once for every pixel, not once for every patch that holds it. The patches of a padded image hold zeros, of which
the functions are taken as well. With functions that are 0 outside the image, as a convolution has them, that is::

    y[o, p] = sum inside the image of W * (phi_k(x) - phi_k(0)) + sum over c, t, k of W * phi_k(0)

so ``-phi_k(0)`` becomes a weight of the function 1, and the last sum part of the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import (
    Cut,
    Flow,
    NotLowerableError,
    cut_out,
    follow,
    largest_row,
    layout_of,
    locate,
    operator_name,
)
from kancompile.frontend.layers.canonical import CanonicalLayer, positions_of
from kancompile.frontend.layers.columns import sample_tokens
from kancompile.frontend.layers.convolution_assembly import ChannelPart, ConvolutionForm, Image, dealt
from kancompile.frontend.layers.pixelwise_map import pixelwise_map
from kancompile.frontend.layers.recognition import refuse_other_layers
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Branch, Expansion, Geometry


@dataclass(frozen=True)
class Patches:
    """How a node cuts images into patches.

    Attributes:
        node: the call; its samples are ``[channels * taps, pixels_out]``.
        anchor: the image ``[b, channels, height, width]``.
        shape: of one image.
        kernel: sides of a patch.
        geometry: how patches follow each other.
        origin: element of the image at every place, int64 ``[channels * taps, pixels_out]``, -1 in the padding.
    """

    node: fx.Node
    anchor: fx.Node
    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    geometry: Geometry
    origin: Tensor

    @property
    def taps(self) -> int:
        """Pixels of a patch."""
        return math.prod(self.kernel)


def find_patches(flow: Flow, region: Region) -> Patches | None:
    """Find the call that all cuts of a layer read their patches from, ``None`` where the layer has none.

    Raises:
        NotLowerableError: there are several, or what is cut into patches is no image.
    """
    found: set[fx.Node] = set()
    stack, seen = list(region.cuts), set(region.cuts)
    while stack:
        node = stack.pop()
        if operator_name(node) == "im2col":
            found.add(node)
        elif node is not flow.track(region.cuts[0]).anchor:
            new = [source for source in flow.data_inputs(node) if source not in seen]
            seen.update(new)
            stack.extend(new)
    if not found:
        return None
    if len(found) > 1:
        raise NotLowerableError("images are cut into patches in several ways")
    (node,) = found
    cut = locate(flow, node)
    layout = layout_of(cut.anchor, flow.batch)
    if not layout.is_plain or len(layout.shape) != 3:
        raise NotLowerableError(f"patches of a tensor of shape {layout.shape}, which is no image")
    kernel, dilation, padding, stride = (_pair(argument) for argument in node.args[1:5])
    channels, height, width = layout.shape
    numbers = torch.arange(1, 1 + math.prod(layout.shape), dtype=torch.float64).reshape(1, *layout.shape)
    expected = torch.nn.functional.unfold(numbers, kernel, dilation, padding, stride)[0].long() - 1
    if cut.origin.numel() != expected.numel() or not torch.equal(cut.origin.reshape(expected.shape), expected):
        raise NotLowerableError("elements move between an image and its patches")
    if bool((cut.constants != 0).any()):
        raise NotLowerableError("the padding of an image is not 0")
    geometry = Geometry(stride, padding, dilation, 1)
    return Patches(node, cut.anchor, (channels, height, width), kernel, geometry, expected)


def canonicalize_patches(flow: Flow, region: Region, name: str, patches: Patches) -> CanonicalLayer:
    """Build the modules of one layer.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    tracks = follow(flow, patches.node, region.cuts)
    cuts = [locate(flow, node, tracks) for node in region.cuts]
    out_shape = layout_of(region.target, flow.batch).shape
    pixels = patches.origin.shape[1]
    if len(out_shape) != 3 or math.prod(out_shape[1:]) != pixels:
        raise NotLowerableError(f"a sum over patches of shape {out_shape}, which is no image of {pixels} pixels")
    # [channels * taps, pixels, k]: where the functions of every place of every patch stand in a cut
    places = [positions_of(cut.origin, patches.origin.numel()).reshape(*patches.origin.shape, -1) for cut in cuts]
    part = _read(flow, patches, cuts, places)
    weight, bias = _weights(flow, region, patches, cuts, places)
    form = ConvolutionForm(region, name, patches.kernel, _with_groups(patches, weight), (out_shape[0], *out_shape[1:]))
    rows = weight.transpose(1, 2).flatten(0, 1)  # [n_out * taps, channels, k]
    constants = []
    if patches.geometry.pads:
        at_zero = sample_tokens(part.expansion, torch.zeros(1))[0]  # [channels, k]
        if not bool(torch.isfinite(at_zero).all()):
            raise NotLowerableError("functions of padded images that have no value at 0")
        missing = (rows.double() * at_zero.double()).sum(-1)  # [n_out * taps, channels]
        bias = (bias.double() + missing.reshape(out_shape[0], -1).sum(1)).float()
        constants.append((-missing.float(), dealt(part.n_in, form.geometry.groups)))
    return form.assemble(flow, [part], [rows.flatten(1)], constants, bias)


def _read(flow: Flow, patches: Patches, cuts: list[Cut], places: list[Tensor]) -> ChannelPart:
    """Make the cuts branches of one expansion of the image; of all patches that hold a pixel one is read."""
    channels, *spatial = patches.shape
    elements = math.prod(patches.shape)
    origin = patches.origin.flatten()
    chosen = torch.full((elements,), -1)
    held = torch.nonzero(origin >= 0).flatten()
    chosen[origin[held]] = held
    if bool((chosen < 0).any()):
        raise NotLowerableError("pixels that are in no patch")
    branches, positions = [], []
    for cut, place in zip(cuts, places, strict=True):
        position = place.flatten(0, 1)[chosen].reshape(channels, *spatial, -1).movedim(0, -2)
        positions.append(position.flatten(0, 1))
        branches.append(Branch(cut.node.name, cut_out(flow, [patches.anchor], cut.node), position.contiguous()))
    expansion = Expansion(patches.shape, branches, channels_first=True)
    pixel_of = torch.arange(elements).reshape(channels, -1).T
    image = Image(patches.anchor, patches.shape, tuple(spatial), True, pixel_of)
    return ChannelPart(image, None, expansion, tuple(range(len(cuts))), tuple(positions))


def _weights(
    flow: Flow, region: Region, patches: Patches, cuts: list[Cut], places: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Read the map from the functions of a patch to a pixel: ``[n_out, channels, taps, k]``, and the bias ``[n_out]``."""
    n_out = layout_of(region.target, flow.batch).shape[0]
    base = [torch.zeros(cut.layout.shape) for cut in cuts]
    for value, cut in zip(base, cuts, strict=True):
        value.view(-1)[cut.origin < 0] = cut.constants
    matrices, bias = pixelwise_map(
        cut_out(flow, region.cuts, region.target),
        base,
        [place.movedim(1, 0).flatten(1) for place in places],
        n_out,
        largest_row(flow, [*region.affine, *region.cuts]),
        "behind",
    )
    parts = [matrix.reshape(n_out, patches.shape[0], patches.taps, -1) for matrix in matrices]
    return torch.cat(parts, dim=-1), bias


def _with_groups(patches: Patches, weight: Tensor) -> Geometry:
    """Find the most groups of outputs that read channels of their own; ``weight`` is ``[n_out, channels, taps, k]``."""
    n_out, channels = weight.shape[:2]
    reads = weight.flatten(2).any(2)
    own = patches.geometry
    for groups in range(math.gcd(n_out, channels), 1, -1):
        if n_out % groups or channels % groups:
            continue
        blocks = reads.reshape(groups, n_out // groups, groups, channels // groups).any(3).any(1)
        if not bool((blocks & ~torch.eye(groups, dtype=torch.bool)).any()):
            return Geometry(own.stride, own.padding, own.dilation, groups)
    return own


def _pair(argument: object) -> tuple[int, int]:
    assert isinstance(argument, list | tuple)
    first, *rest = (int(value) for value in argument)
    return first, (rest or [first])[0]
