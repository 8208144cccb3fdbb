"""Bring a layer whose contraction is a convolution into canonical form.

The functions of an input channel have to be the same at every pixel, and the values at one pixel of the convolution's
input have to come from that pixel: then a layer is a pointwise expansion of the channels, and the kernel of the
convolution with its input channels sorted by (channel, function). Several convolutions that are added up become one. What
stands between them and the target is folded into the kernel and the bias.

Zero padding is applied to the functions. A constant value in front of a padded convolution is therefore no bias: it is
missing outside the image. All constants become one more function of every channel, the number 1, and their values are
part of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import (
    ChannelSelection,
    Cut,
    Flow,
    NotLowerableError,
    Selection,
    cut_out,
    image_order,
    image_shape,
    largest_row,
    layout_of,
    locate,
)
from kancompile.frontend.layers.canonical import CanonicalLayer, positions_of
from kancompile.frontend.layers.convolution_assembly import ChannelPart, ConvolutionForm, Image, dealt
from kancompile.frontend.layers.pixelwise_map import ConvolutionNode, leading_convolutions, pixelwise_map
from kancompile.frontend.layers.recognition import refuse_other_layers
from kancompile.frontend.layers.regions import Region, without_final_movement
from kancompile.ir import Branch, Expansion, Geometry


def canonicalize_convolution(flow: Flow, region: Region, name: str, largest: int) -> CanonicalLayer:
    """Build the modules of one convolutional layer.

    Reshapes at its end stay behind the layer: its target is what the last of the affine nodes before them returns. At most
    ``largest`` weights are written out.

    Raises:
        NotLowerableError: the layer is no KAN layer or cannot take this form; the text says why.
    """
    refuse_other_layers(flow, region)
    region = without_final_movement(flow, region)
    convolutions = leading_convolutions(flow, region.affine, region.cuts)
    cuts = [locate(flow, node) for node in region.cuts]
    source = layout_of(convolutions[0].source, flow.batch)
    any_size = len(source.dims) > 1
    spatial = image_shape(source)[1:] if any_size else source.shape[1:]
    anchors = list(dict.fromkeys(cut.anchor for cut in cuts))
    refusals: list[NotLowerableError] = []
    for channels_first in (True, False):
        try:
            images = [_image(flow, anchor, spatial, channels_first, any_size) for anchor in anchors]
            return _Builder(flow, region, name, convolutions, cuts, images).build(largest)
        except NotLowerableError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _image(flow: Flow, anchor: fx.Node, spatial: tuple[int, ...], channels_first: bool, any_size: bool) -> Image:
    layout = layout_of(anchor, flow.batch)
    shape = image_shape(layout) if any_size else layout.shape
    if any_size and (shape[1:] != spatial or not channels_first):
        raise NotLowerableError(
            f"an input {tuple(anchor.meta['val'].shape)} that is no such image as the convolution reads"
        )
    size, pixels = math.prod(shape), math.prod(spatial)
    if size % pixels or (not channels_first and shape[:-1] != spatial):
        raise NotLowerableError(f"an input of shape {shape} has no {'x'.join(map(str, spatial))} pixels")
    numbers = torch.arange(size)
    pixel_of = numbers.reshape(-1, pixels).T if channels_first else numbers.reshape(pixels, -1)
    return Image(anchor, shape, spatial, channels_first, pixel_of)


class _Builder:
    """The steps of one layer; all weights are kept dense, ``[n_out, taps, columns]``, until the end."""

    def __init__(
        self,
        flow: Flow,
        region: Region,
        name: str,
        convolutions: Sequence[ConvolutionNode],
        cuts: Sequence[Cut],
        images: Sequence[Image],
    ) -> None:
        self.flow, self.region, self.name = flow, region, name
        self.convolutions, self.cuts, self.images = convolutions, cuts, images
        self.taps = convolutions[0].taps
        same = len({convolution.geometry.groups for convolution in convolutions}) == 1
        moves = convolutions[0].geometry
        self.groups = moves.groups if same else 1
        layout = layout_of(region.target, flow.batch)
        self.any_size = len(layout_of(convolutions[0].source, flow.batch).dims) > 1
        self.out_shape, example = layout.shape, layout.shape
        if self.any_size:
            if image_order(layout) != sorted(image_order(layout)):
                raise NotLowerableError("channels do not stand first behind the convolution")
            self.out_shape, example = image_shape(layout), tuple(flow.values[region.target].shape[1:])
        geometry = Geometry(moves.stride, moves.padding, moves.dilation, self.groups)
        pixel = images[0].spatial if self.any_size else None
        self.form = ConvolutionForm(region, name, convolutions[0].kernel, geometry, example, pixel)
        self.row_elements = largest_row(flow, [*region.affine, *region.cuts])

    def build(self, largest: int) -> CanonicalLayer:
        parts = [part for image in self.images if (part := self._read(image)) is not None]
        if not parts:
            raise NotLowerableError("convolution of constants")
        kernels, bias = self._kernels()
        weights, constants = self._columns(parts, kernels, largest)
        return self.form.assemble(self.flow, parts, weights, constants, bias)

    def _read(self, image: Image) -> ChannelPart | None:
        """Make the cuts of one anchor branches of one expansion, ``None`` where all of them are constant."""
        flow, cuts = self.flow, self.cuts
        own = [number for number, cut in enumerate(cuts) if cut.anchor is image.anchor]
        every = [positions_of(cuts[number].origin, image.pixel_of.numel())[image.pixel_of] for number in own]
        used = torch.cat([places >= 0 for places in every], dim=-1).any(-1)  # [pixels, channels]
        if not bool(used.any()):
            return None
        if not bool((used == used[:1]).all()):
            raise NotLowerableError("inputs differ between pixels")
        channels = torch.nonzero(used[0]).flatten()
        selection = _selection(image, channels)
        branches, shape = [], (*image.spatial, len(channels))
        read = image.shape if selection is None else selection.shape
        for number, places in zip(own, every, strict=True):
            node = cuts[number].node
            places = places[:, channels]
            position = places.reshape(*shape, -1)
            if node is image.anchor:
                own_numbers = torch.arange(math.prod(shape))
                position = (
                    own_numbers.reshape(-1, math.prod(image.spatial)).T if image.channels_first else own_numbers
                ).reshape(*shape, 1)
            inner = None if node is image.anchor else cut_out(flow, [image.anchor], node, selection)
            branches.append(Branch(node.name, inner, position.contiguous()))
        expansion = Expansion(read, branches, channels_first=image.channels_first)
        return ChannelPart(image, selection, expansion, tuple(own), tuple(places[:, channels] for places in every))

    def _kernels(self) -> tuple[list[Tensor], Tensor]:
        """Fold what follows the convolutions: kernels ``[n_out, taps, c]`` of each, and the bias of the layer."""
        flow, nodes = self.flow, [convolution.node for convolution in self.convolutions]
        out_shape = self.out_shape
        layouts = [layout_of(node, flow.batch) for node in nodes]
        shapes = [image_shape(layout) if self.any_size else layout.shape for layout in layouts]
        if len(out_shape) != len(shapes[0]) or out_shape[1:] != shapes[0][1:]:
            raise NotLowerableError(f"what follows the convolution makes {out_shape} of {shapes[0]}")
        pixels = math.prod(out_shape[1:])
        elements = [torch.arange(math.prod(shape)).reshape(-1, pixels).T for shape in shapes]
        behind = cut_out(flow, nodes, self.region.target)
        base = [torch.zeros(shape) for shape in shapes]
        matrices, bias = pixelwise_map(behind, base, elements, out_shape[0], self.row_elements, "behind")
        kernels = []
        for matrix, convolution in zip(matrices, self.convolutions, strict=True):
            dense = convolution.dense_weight().transpose(1, 2)  # [n_out, taps, c]
            kernels.append(_product(matrix, dense.flatten(1)).reshape(len(matrix), *dense.shape[1:]))
            bias = bias + matrix @ convolution.bias
        return kernels, bias

    def _columns(
        self, parts: Sequence[ChannelPart], kernels: Sequence[Tensor], largest: int
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Sort the kernels by (channel, function).

        Returns:
            weights ``[n_out * taps, n_in * k]`` of each part, and for the constants in front of each convolution weights
            ``[n_out * taps, m]`` with their places in the groups, int64 ``[m, 2]``.
        """
        n_rows = self.out_shape[0] * self.taps
        n_columns = sum(part.n_in * part.expansion.k for part in parts)
        if n_rows * n_columns > largest:
            raise NotLowerableError(f"a kernel of {n_rows} x {n_columns} weights would be too large")
        sums: dict[int, Tensor] = {}  # cut -> [n_out * taps, n_in * k]
        constants = []
        places = {
            number: own for part in parts for number, own in zip(part.cuts, part.places, strict=True)
        }  # [pixels, n_in, k]
        for convolution, kernel in zip(self.convolutions, kernels, strict=True):
            rows = kernel.flatten(0, 1)
            maps, constant = self._source(convolution, places)
            for number, matrix in maps.items():
                sums[number] = sums.get(number, torch.zeros(())) + _product(rows, matrix)
            if bool(constant.any()):
                constants.append((rows * constant, self._owners(convolution, parts[0], maps)))
        weights = []
        for part in parts:
            own = [
                sums[n].reshape(n_rows, part.n_in, -1) if n in sums else torch.zeros(n_rows, *p.shape[1:])
                for n, p in zip(part.cuts, part.places, strict=True)
            ]
            weights.append(torch.cat(own, dim=-1).flatten(1))
        return weights, constants

    def _source(self, convolution: ConvolutionNode, places: dict[int, Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """Give what a convolution's input channels hold: of every cut a matrix ``[c, n_in * k]``, and a constant ``[c]``."""
        flow, region = self.flow, self.region
        n_channels = flow.values[convolution.source].shape[1]
        base = [cut.base() for cut in self.cuts]
        if convolution.source in region.cuts:
            number = region.cuts.index(convolution.source)
            constants = base[number].reshape(n_channels, -1)
            if not bool((constants == constants[:, :1]).all()):
                raise NotLowerableError("constants in front of the convolution differ between pixels")
            matrix = _picked(places[number], n_channels) if number in places else None
            return ({} if matrix is None else {number: matrix}), constants[:, 0].clone()
        numbers = [number for number in range(len(self.cuts)) if number in places]
        nothing = torch.empty(len(next(iter(places.values()))), 0, dtype=torch.int64)
        columns = [places[n].flatten(1) if n in places else nothing for n in range(len(self.cuts))]
        in_front = cut_out(flow, region.cuts, convolution.source)
        matrices, constant = pixelwise_map(in_front, base, columns, n_channels, self.row_elements, "in front of")
        return {number: matrices[number] for number in numbers}, constant

    def _owners(self, convolution: ConvolutionNode, first: ChannelPart, maps: dict[int, Tensor]) -> Tensor:
        """Give every input channel of a convolution a place in its group, int64 ``[c, 2]``, for the constant it carries.

        It is that of the channel of the first expansion whose functions it carries as well, else the next one.
        """
        n_channels = int(self.flow.values[convolution.source].shape[1])
        owners = dealt(n_channels, self.groups)
        relevant = [maps[number].reshape(n_channels, first.n_in, -1) for number in first.cuts if number in maps]
        if relevant:
            size = torch.cat([matrix.abs() for matrix in relevant], dim=-1).amax(-1)  # [c, n_in]
            own = dealt(first.n_in, self.groups)[size.argmax(1)]
            holds = size.amax(1) > 0
            for group in range(self.groups):  # constants alone take places in order, whatever stands between them
                alone = ~holds & (owners[:, 0] == group)
                owners[alone, 1] = torch.arange(int(alone.sum()))
            owners = torch.where(holds[:, None], own, owners)
        return owners


def _selection(image: Image, channels: Tensor) -> Selection | None:
    if image.channels_first:
        whole = len(channels) == image.channels and image.shape == (image.channels, *image.spatial)
        return None if whole else ChannelSelection((), image.channels, channels, image.spatial)
    return None if len(channels) == image.channels else Selection(image.spatial, image.channels, channels)


def _picked(places: Tensor, n_channels: int) -> Tensor:
    """Give the matrix of a convolution that reads a cut itself: ``places`` ``[pixels, n_in, k]`` -> ``[c, n_in * k]``.

    Raises:
        NotLowerableError: a value stands at another pixel than the element it is a function of.
    """
    pixels = len(places)
    flat = places.flatten(1)
    own = torch.where(flat >= 0, flat % pixels, torch.arange(pixels)[:, None])
    channel = torch.where(flat >= 0, flat // pixels, -1)
    if not bool((own == torch.arange(pixels)[:, None]).all()) or not bool((channel == channel[:1]).all()):
        raise NotLowerableError("elements move between pixels in front of the convolution")
    matrix = torch.zeros(n_channels, flat.shape[1])
    columns = torch.nonzero(channel[0] >= 0).flatten()
    matrix[channel[0, columns], columns] = 1
    return matrix


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices; where every column of ``right`` or row of ``left`` has one entry, nothing but that is rounded."""
    return (left.double() @ right.double()).float()
