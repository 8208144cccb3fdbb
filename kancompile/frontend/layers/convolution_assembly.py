"""Put a convolutional layer together from the functions of its channels and a kernel.

Constants in front of a padded convolution are missing outside the image, so they are no bias: all of them become one more
function of every channel, the number 1, and their values are part of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.frontend.flow import Flow, NotLowerableError, Selection
from kancompile.frontend.layers.canonical import CanonicalLayer
from kancompile.frontend.layers.columns import Columns, merge_columns, sample_points, sample_tokens, tokens_are_alike
from kancompile.frontend.layers.recognition import is_kan, refuse_plain
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Branch, Contraction, Expansion, Geometry


@dataclass(frozen=True)
class Image:
    """How an anchor's elements are channels and pixels: ``pixel_of`` is int64 ``[pixels, channels]``, element numbers."""

    anchor: fx.Node
    shape: tuple[int, ...]
    spatial: tuple[int, ...]
    channels_first: bool
    pixel_of: Tensor

    @property
    def channels(self) -> int:
        """Number of channels."""
        return int(self.pixel_of.shape[1])


@dataclass
class ChannelPart:
    """What the layer reads from one anchor; ``places`` are the elements of every cut, ``[pixels, n_in, k]``, -1 for none."""

    image: Image
    selection: Selection | None
    expansion: Expansion
    cuts: tuple[int, ...]
    places: tuple[Tensor, ...]

    @property
    def n_in(self) -> int:
        """Number of channels that are read."""
        return self.expansion.n_in


@dataclass(frozen=True)
class ConvolutionForm:
    """What is known of a layer before its weights: how its kernel moves, and what it yields, ``(n_out, *spatial)``.

    Over images of any size that is what it yields for the example, and ``pixel`` what its expansions are of.
    """

    region: Region
    name: str
    kernel: tuple[int, ...]
    geometry: Geometry
    out_shape: tuple[int, ...]
    pixel: tuple[int, ...] | None = None

    @property
    def taps(self) -> int:
        """Product of the kernel's sides."""
        return math.prod(self.kernel)

    def assemble(
        self,
        flow: Flow,
        parts: Sequence[ChannelPart],
        weights: Sequence[Tensor],
        constants: list[tuple[Tensor, Tensor]],
        bias: Tensor,
    ) -> CanonicalLayer:
        """Leave out what carries nothing, and put the layer together.

        Args:
            flow: analysis of the network.
            parts: what it reads.
            weights: ``[n_out * taps, n_in * k]`` of each part.
            constants: weights ``[n_out * taps, m]`` of constants that are missing outside the image, with their places in
                the groups, int64 ``[m, 2]``.
            bias: ``[n_out]``.

        Raises:
            NotLowerableError: it is no KAN layer, or its functions differ between pixels.
        """
        constants = list(constants)
        kept: list[tuple[ChannelPart, Columns]] = []
        kan = False
        for part, weight in zip(parts, weights, strict=True):
            if not tokens_are_alike(part.expansion):
                raise NotLowerableError("functions differ between pixels")
            values = sample_tokens(part.expansion, sample_points())
            columns = Columns(part.expansion, weight.reshape(-1, part.n_in, part.expansion.k))
            merged, shift, values = merge_columns(columns, values, flow.values[part.image.anchor])
            constants.append((shift, dealt(part.n_in, self.geometry.groups)))
            if merged is not None:
                kan = kan or is_kan(merged.expansion, values)
                kept.append((part, merged))
        refuse_plain([columns.expansion for _, columns in kept], kan, "convolution")
        kept, bias = self._with_constants(kept, constants, bias)
        return self._layer(kept, bias)

    def _with_constants(
        self, kept: list[tuple[ChannelPart, Columns]], constants: Sequence[tuple[Tensor, Tensor]], bias: Tensor
    ) -> tuple[list[tuple[ChannelPart, Columns]], Tensor]:
        """Put constants into the bias or, where there is padding, into one more function of the first expansion."""
        n_out = self.out_shape[0]
        if not self.geometry.pads:
            for weight, _ in constants:
                bias = bias + weight.sum(1).reshape(n_out, self.taps).sum(1)
            return kept, bias
        part, columns = kept[0]
        n_in = columns.expansion.n_in
        groups = self.geometry.groups if n_in % self.geometry.groups == 0 else 1
        added = torch.zeros(n_out * self.taps, n_in)
        for weight, owners in constants:
            share = n_in // groups
            place = (owners[:, 0] % groups) * share + owners[:, 1] % share
            added.index_add_(1, place, weight)
        if not bool(added.any()):
            return kept, bias
        branches = [*columns.expansion.branches, _ones(columns.expansion)]
        expansion = Expansion(columns.expansion.anchor_shape, branches, columns.expansion.channels_first)
        weight = torch.cat([columns.weight, added[..., None]], dim=-1)
        return [(part, Columns(expansion, weight)), *kept[1:]], bias

    def _layer(self, kept: Sequence[tuple[ChannelPart, Columns]], bias: Tensor) -> CanonicalLayer:
        n_out, groups = self.out_shape[0], self.geometry.groups
        weights = [columns.weight.reshape(n_out, self.taps, *columns.weight.shape[1:]) for _, columns in kept]
        grouped = _block_diagonal(weights, groups) if groups > 1 else None
        if grouped is None:
            groups, grouped = 1, torch.cat([weight.flatten(2) for weight in weights], dim=-1)
        geometry = self.geometry
        return CanonicalLayer(
            self.region,
            tuple(part.image.anchor for part, _ in kept),
            tuple(part.selection for part, _ in kept),
            tuple(columns.expansion for _, columns in kept),
            Contraction(
                self.name,
                grouped.transpose(1, 2).reshape(n_out, -1, *self.kernel).contiguous(),
                bias,
                self.out_shape,
                Geometry(geometry.stride, geometry.padding, geometry.dilation, groups),
            ),
            pixel=self.pixel,
        )


def dealt(count: int, groups: int) -> Tensor:
    """Give ``count`` channels in order their group and place within it, int64 ``[count, 2]``."""
    groups = groups if count % groups == 0 else 1
    numbers, share = torch.arange(count), count // groups
    return torch.stack([numbers // share, numbers % share], dim=1)


def _ones(expansion: Expansion) -> Branch:
    """Build the branch that is 1 for every input."""
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.ones_like.default, (graph.placeholder("x"),)))
    position = torch.arange(math.prod(expansion.in_shape)).reshape(*expansion.in_shape, 1)
    return Branch("one", fx.GraphModule({}, graph), position)


def _block_diagonal(weights: Sequence[Tensor], groups: int) -> Tensor | None:
    """Keep the blocks of groups, ``[n_out, taps, n_in, k]`` -> ``[n_out, taps, c / groups]``; ``None`` where others count."""
    n_out = len(weights[0])
    if n_out % groups or any(weight.shape[2] % groups for weight in weights):
        return None
    blocks = []
    for group in range(groups):
        rows = slice(group * n_out // groups, (group + 1) * n_out // groups)
        parts = []
        for weight in weights:
            share = weight.shape[2] // groups
            inside = weight[rows, :, group * share : (group + 1) * share]
            if int(torch.count_nonzero(inside)) != int(torch.count_nonzero(weight[rows])):
                return None
            parts.append(inside.flatten(2))
        blocks.append(torch.cat(parts, dim=-1))
    return torch.cat(blocks)
