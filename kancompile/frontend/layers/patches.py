"""Bring a layer that cuts its images into patches before its functions into the form of a convolution.

    y[o, p] = sum over c, t, k of W[o, (c, t), k] * phi_k(x at pixel p + t of channel c)

is a convolution of ``phi_k(x)`` if the functions of a channel are the same at all places ``t`` of a patch: the functions are
then evaluated once for every pixel, not once for every patch that holds it. The patches of a padded image hold zeros, of which
the functions are taken as well. With functions that are 0 outside the image, as a convolution has them, that is::

    y[o, p] = sum inside the image of W * (phi_k(x) - phi_k(0)) + sum over c, t, k of W * phi_k(0)

so ``-phi_k(0)`` becomes a weight of the function 1, and the last sum part of the bias.

Where the size of an image is dynamic, a row is one patch: functions are those of its first place, and whole images confirm that
all places have them.
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
    Selection,
    cut_out,
    follow,
    image_order,
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
        any_size: whether the size of an image is dynamic.
    """

    node: fx.Node
    anchor: fx.Node
    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    geometry: Geometry
    origin: Tensor
    any_size: bool = False

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
    track = flow.track(node)
    anchor, ids = flow.values[track.anchor], flow.track(track.anchor).ids
    layout = layout_of(track.anchor, flow.batch)
    any_size = len(layout.dims) > 1
    if anchor.dim() != 4 or not (image_order(layout) == [0, 1, 2, 3] if any_size else layout.is_plain):
        raise NotLowerableError(f"patches of a tensor of shape {tuple(anchor.shape[1:])}, which is no image")
    kernel, dilation, padding, stride = (_pair(argument) for argument in node.args[1:5])
    numbers = torch.nn.functional.unfold((1 + ids).double(), kernel, dilation, padding, stride).long() - 1
    if not torch.equal(track.ids, numbers):
        raise NotLowerableError("elements move between an image and its patches")
    if bool((flow.values[node][numbers < 0] != 0).any()):
        raise NotLowerableError("the padding of an image is not 0")
    channels, height, width = anchor.shape[1:]
    geometry = Geometry(stride, padding, dilation, 1)
    return Patches(node, track.anchor, (channels, height, width), kernel, geometry, numbers[0], any_size)


def canonicalize_patches(flow: Flow, region: Region, name: str, patches: Patches) -> CanonicalLayer:
    """Build the modules of one layer.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    tracks = follow(flow, patches.node, region.cuts)
    cuts = [locate(flow, node, tracks) for node in region.cuts]
    out_layout = layout_of(region.target, flow.batch)
    out_shape = tuple(flow.values[region.target].shape[1:])
    pixels = patches.origin.shape[1]
    is_image = image_order(out_layout) == [0, 1, 2, 3] if patches.any_size else out_layout.is_plain
    if not is_image or len(out_shape) != 3 or math.prod(out_shape[1:]) != pixels:
        raise NotLowerableError(f"a sum over patches of shape {out_shape}, which is no image of {pixels} pixels")
    # [channels * taps, pixels, k]: where the functions of every place of every patch of a row stand in a cut
    shape = (len(patches.origin), 1 if patches.any_size else pixels)
    places = [positions_of(cut.origin, math.prod(shape)).reshape(*shape, -1) for cut in cuts]
    part = (_read_pixel if patches.any_size else _read)(flow, patches, cuts, places)
    weight, bias = _weights(flow, region, patches, cuts, places)
    pixel = (1, 1) if patches.any_size else None
    form = ConvolutionForm(region, name, patches.kernel, _with_groups(patches, weight), out_shape, pixel)
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


def _read_pixel(flow: Flow, patches: Patches, cuts: list[Cut], places: list[Tensor]) -> ChannelPart:
    """Make the cuts branches of one expansion of a pixel; of the places of a patch the first one is read."""
    channels = patches.shape[0]
    first = Selection((), channels * patches.taps, torch.arange(channels) * patches.taps)
    positions = [place[first.used, 0] for place in places]
    branches = [
        Branch(cut.node.name, cut_out(flow, [patches.node], cut.node, first), position.reshape(1, 1, channels, -1))
        for cut, position in zip(cuts, positions, strict=True)
    ]
    expansion = Expansion((channels, 1, 1), branches, channels_first=True)
    image = Image(patches.anchor, (channels, 1, 1), (1, 1), True, torch.arange(channels)[None])
    return ChannelPart(image, None, expansion, tuple(range(len(cuts))), tuple(p[None] for p in positions))


def _weights(
    flow: Flow, region: Region, patches: Patches, cuts: list[Cut], places: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Read the map from the functions of a patch to a pixel: ``[n_out, channels, taps, k]``, and the bias ``[n_out]``."""
    n_out = flow.values[region.target].shape[1]
    base = [cut.base() for cut in cuts]
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
