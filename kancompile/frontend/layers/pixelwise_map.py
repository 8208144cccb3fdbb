"""Read convolutions of the graph, and affine parts of it that mix the channels of each pixel but no pixels.

In front of a convolution the values that its input channels carry are joined (degree-major, feature-major, scaled, added
up); behind it come bias, batch norm, sums. Both are maps from channels to channels, the same at every pixel, and are read
as such by differentiation, a matrix of channels instead of one of all elements of the images. That a part really is such
a map is checked: every pixel has to have the same matrix and constant, and weights that differ between pixels must
arrive at their own pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.errors import reason
from kancompile.frontend.flow import Flow, NotLowerableError, image_order, layout_of, operator_name
from kancompile.ir import Geometry

_CHUNK_ELEMENTS = 1 << 22
"""Elements of the largest intermediate tensor of one chunk (16 MiB in float32)."""
LARGEST_WEIGHT = 1 << 27
"""Most entries of a matrix or kernel that is written out (512 MiB in float32)."""
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ConvolutionNode:
    """One convolution of the graph with a constant kernel.

    Attributes:
        node: the call.
        source: its input, ``[b, c, *spatial]``.
        weight: float32 ``[n_out, c / groups, *kernel]``.
        bias: float32 ``[n_out]``.
        geometry: how the kernel moves.
    """

    node: fx.Node
    source: fx.Node
    weight: Tensor
    bias: Tensor
    geometry: Geometry

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def taps(self) -> int:
        """Product of the kernel's sides."""
        return math.prod(self.kernel)

    def dense_weight(self) -> Tensor:
        """Write the kernel out without groups, float32 ``[n_out, c, taps]``."""
        groups = self.geometry.groups
        parts = self.weight.flatten(2).chunk(groups)
        n_in = self.weight.shape[1]
        if self.weight.numel() * groups > LARGEST_WEIGHT:
            raise NotLowerableError(f"a kernel of {self.weight.numel() * groups} weights would be too large")
        dense = torch.zeros(len(self.weight), n_in * groups, self.taps)
        for group, part in enumerate(parts):
            dense[group * len(part) : (group + 1) * len(part), group * n_in : (group + 1) * n_in] = part
        return dense


def is_over_positions(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a convolution with more than one output pixel; others are matrix products."""
    return operator_name(node) == "convolution" and math.prod(flow.values[node].shape[2:]) > 1


def can_be_added(flow: Flow, nodes: Sequence[fx.Node]) -> bool:
    """Whether the sum of convolutions is a convolution."""
    try:
        _alike(flow, [_read(flow, node, ()) for node in nodes])
    except NotLowerableError:
        return False
    return True


def leading_convolutions(flow: Flow, affine: Sequence[fx.Node], cuts: Sequence[fx.Node]) -> list[ConvolutionNode]:
    """List the convolutions of a layer that no other one precedes.

    Args:
        flow: analysis of the network.
        affine: the layer's affine nodes in order of evaluation.
        cuts: the nodes that they read.

    Raises:
        NotLowerableError: they do not move alike, or are no plain convolutions of images.
    """
    behind: set[fx.Node] = set()
    found = []
    for node in affine:
        if any(source in behind for source in flow.data_inputs(node)):
            behind.add(node)
        elif is_over_positions(flow, node):
            behind.add(node)
            found.append(_read(flow, node, cuts))
    return _alike(flow, found)


def _alike(flow: Flow, found: Sequence[ConvolutionNode]) -> list[ConvolutionNode]:
    largest = max(found, key=lambda convolution: convolution.taps)
    return [_embedded(convolution, largest, flow) for convolution in found]


def _embedded(small: ConvolutionNode, large: ConvolutionNode, flow: Flow) -> ConvolutionNode:
    """Write a convolution with the kernel and padding of a larger one that has all its taps, the others being 0.

    A skip connection through a kernel of 1 becomes the center of a padded kernel of 3, for example.
    """
    own, frame = small.geometry, large.geometry
    if (small.kernel, own.padding, own.dilation, own.stride) == (
        large.kernel,
        frame.padding,
        frame.dilation,
        frame.stride,
    ):
        return small
    places = [
        [(frame.padding[d] - own.padding[d] + tap * own.dilation[d]) / frame.dilation[d] for tap in range(side)]
        for d, side in enumerate(small.kernel)
    ]
    fits = all(p.is_integer() and 0 <= p < side for ps, side in zip(places, large.kernel, strict=True) for p in ps)
    if (
        not fits
        or own.stride != frame.stride
        or flow.values[small.source].shape[2:] != flow.values[large.source].shape[2:]
    ):
        raise NotLowerableError(
            f"convolutions of kernels {small.kernel} and {large.kernel}, stride {own.stride} and {frame.stride}, padding "
            f"{own.padding} and {frame.padding}, dilation {own.dilation} and {frame.dilation} are added up"
        )
    weight = torch.zeros(*small.weight.shape[:2], *large.kernel)
    grid = torch.meshgrid(*(torch.tensor([int(p) for p in ps]) for ps in places), indexing="ij")
    flat = torch.zeros(small.kernel, dtype=torch.int64)
    for place, side in zip(grid, large.kernel, strict=True):
        flat = flat * side + place
    weight.flatten(2)[:, :, flat.flatten()] = small.weight.flatten(2)
    geometry = Geometry(frame.stride, frame.padding, frame.dilation, own.groups)
    return ConvolutionNode(small.node, small.source, weight, small.bias, geometry)


def _read(flow: Flow, node: fx.Node, cuts: Sequence[fx.Node]) -> ConvolutionNode:
    source, kernel, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed:
        raise NotLowerableError("transposed convolution")
    assert isinstance(source, fx.Node)
    assert isinstance(kernel, fx.Node)
    assert isinstance(groups, int)
    if source not in flow.tracks or kernel in flow.tracks or bias in flow.tracks:
        raise NotLowerableError("convolution with a kernel that depends on data")
    weight = flow.values[kernel].detach()
    layout = layout_of(source, flow.batch)
    is_image = len(layout.dims) > 1 and image_order(layout) == [*range(weight.dim())]
    if not is_image and (not layout.is_plain or len(layout.shape) != weight.dim() - 1):
        raise NotLowerableError("the batch is merged with other dimensions in front of a convolution")
    offset = flow.values[bias].detach() if isinstance(bias, fx.Node) else torch.zeros(len(weight))
    sides = _sides(weight, padding)
    while source not in cuts and (added := _zero_padding(source, weight.dim() - 2)) is not None:
        (source,) = flow.data_inputs(source)
        sides = tuple(side + more for side, more in zip(sides, added, strict=True))
    geometry = Geometry(_sides(weight, stride), sides, _sides(weight, dilation), groups)
    return ConvolutionNode(node, source, weight.clone(), offset.clone(), geometry)


def _zero_padding(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """Give the zeros that a node puts on every side of an image, ``None`` where it does anything else."""
    if operator_name(node) != "constant_pad_nd" or (len(node.args) > 2 and node.args[2] != 0):
        return None
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    low, high = sizes[0::2], sizes[1::2]
    if low != high or any(size != 0 for size in low[dims:]) or any(not isinstance(s, int) or s < 0 for s in low):
        return None
    return tuple(int(size) for size in (*low, *[0] * dims)[:dims][::-1])


def _sides(weight: Tensor, argument: object) -> tuple[int, ...]:
    assert isinstance(argument, list | tuple)
    values = tuple(int(value) for value in argument)
    return values * (weight.dim() - 2) if len(values) == 1 else values


def pixelwise_map(
    module: fx.GraphModule,
    base: Sequence[Tensor],
    columns: Sequence[Tensor],
    n_out: int,
    row_elements: int,
    place: str,
) -> tuple[list[Tensor], Tensor]:
    """Compute ``y[:, p] = sum of matrix_j @ x_j[columns_j[p]] + constant`` of an affine module, the same at all pixels p.

    Args:
        module: maps tensors ``[b, *shape_j]`` to ``[b, n_out, *spatial]``.
        base: float32 ``[*shape_j]``, 0 or the value of an element that is constant.
        columns: int64 ``[pixels, c_j]``, for each pixel the flattened elements of input ``j`` that belong to it, -1 for
            none.
        n_out: output channels.
        row_elements: elements for one sample of the largest intermediate tensor, which sets the chunk size.
        place: what the module is, for the error.

    Returns:
        float32 matrices ``[n_out, c_j]`` and the constant ``[n_out]``.

    Raises:
        NotLowerableError: it is no such map.
    """
    pixels = len(columns[0])
    with torch.no_grad():
        zero = module(*(value.unsqueeze(0) for value in base))
    if zero.numel() != n_out * pixels:
        raise NotLowerableError(f"{place} the convolution changes the number of pixels")
    zero = zero.reshape(n_out, pixels)
    if not torch.allclose(zero, zero[:, :1].expand_as(zero), rtol=_TOLERANCE, atol=1e-7):
        raise NotLowerableError(f"constants {place} the convolution differ between pixels")

    def pull_back(seed: Tensor) -> list[Tensor]:
        """Give the derivative of ``<seed, y>`` by every column at every pixel, ``[rows, pixels, c_j]``."""
        count = len(seed)
        if count == 1:  # the derivative of a batch norm of one image in channels-last order is wrong in PyTorch 2.13
            seed = seed.expand(2, *seed.shape[1:])
        with torch.enable_grad():
            inputs = [value.expand(len(seed), *value.shape).clone().requires_grad_() for value in base]
            try:
                outputs = module(*inputs)
                gradients = torch.autograd.grad(outputs, inputs, seed.reshape(outputs.shape), allow_unused=True)
            except RuntimeError as error:
                raise NotLowerableError(f"its affine part has no derivative ({reason(error)})") from error
        return [
            torch.zeros(count, *wanted.shape)
            if gradient is None
            else gradient.flatten(1)[:count, wanted.clamp(min=0)] * (wanted >= 0)
            for gradient, wanted in zip(gradients, columns, strict=True)
        ]

    parts: list[list[Tensor]] = [[] for _ in base]
    chunk = max(1, min(n_out, _CHUNK_ELEMENTS // row_elements))
    for start in range(0, n_out, chunk):
        rows = min(chunk, n_out - start)
        seed = torch.zeros(rows, n_out, pixels)
        seed[torch.arange(rows), torch.arange(start, start + rows)] = 1
        for part, gradient in zip(parts, pull_back(seed), strict=True):
            if not torch.allclose(gradient, gradient[:, :1].expand_as(gradient), rtol=_TOLERANCE, atol=1e-7):
                raise NotLowerableError(f"the weights {place} the convolution differ between pixels")
            part.append(gradient[:, 0])
    matrices = [torch.cat(part) for part in parts]
    generator = torch.Generator().manual_seed(4)
    channel, pixel = torch.randn(n_out, generator=generator), torch.randn(pixels, generator=generator)
    for matrix, gradient in zip(matrices, pull_back((channel[:, None] * pixel)[None]), strict=True):
        expected = pixel[:, None] * (channel @ matrix)
        size = (channel.abs() @ matrix.abs()).amax() if matrix.numel() else torch.tensor(0.0)
        if not torch.allclose(gradient[0], expected, rtol=0, atol=1e-4 * float(size * pixel.abs().max()) + 1e-12):
            raise NotLowerableError(f"elements move between pixels {place} the convolution")
    return matrices, zero[:, 0].clone()
