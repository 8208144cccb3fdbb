"""Images of dynamic height or width, ``[b, channels, *spatial]``: a row is what is fixed, one pixel or one line of pixels.

A layer over such images is read off the graph with the dynamic dimensions at a size of 1, so that nothing in its modules depends
on the size of an image; that pixels are treated alike is confirmed on whole images.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from kancompile.frontend.flow.batch_layout import BatchLayout, NotLowerableError

_SIZES = (1, sympy.Rational(1, 2), sympy.Rational(1, 4), sympy.Rational(1, 8), *range(2, 33))
"""Sizes of inputs that may leave one pixel of a layer's images; fractions where an input is a multiple of a size."""


def image_order(layout: BatchLayout) -> list[int]:
    """Give the dimensions of a tensor in the order ``[b, channels, *spatial]``.

    Raises:
        NotLowerableError: it does not say which dimension holds channels.
    """
    rank = len(layout.dims) + len(layout.shape)
    fixed = [dim for dim in range(rank) if dim not in layout.dims]
    if layout.factor > 1 or not fixed or (len(fixed) > 1 and fixed[0] != 1):
        raise NotLowerableError(f"a tensor of {len(layout.dims)} dynamic dimensions whose channels stand behind others")
    return [layout.dims[0], fixed[0], *sorted({*range(rank)} - {layout.dims[0], fixed[0]})]


def image_shape(layout: BatchLayout) -> tuple[int, ...]:
    """Give the shape ``(channels, *spatial)`` of an image, dynamic sizes as 1: what rows of ``layout`` are in this order."""
    fixed = iter(layout.shape[1:])
    return layout.shape[0], *(1 if dim in layout.dims else next(fixed) for dim in image_order(layout)[2:])


def emit_image(graph: fx.Graph, node: fx.Node, layout: BatchLayout) -> fx.Node:
    """Append nodes that bring a tensor to ``[b, channels, *spatial]``."""
    order = image_order(layout)
    if order == sorted(order):
        return node
    return graph.call_function(torch.ops.aten.permute.default, (node, order))


def emit_tensor(graph: fx.Graph, image: fx.Node, layout: BatchLayout) -> fx.Node:
    """Append nodes that bring ``[b, channels, *spatial]`` to the order of a tensor."""
    order = image_order(layout)
    if order == sorted(order):
        return image
    back = [order.index(dim) for dim in range(len(order))]
    return graph.call_function(torch.ops.aten.permute.default, (image, back))


def whole_image(value: Tensor, layout: BatchLayout) -> Tensor:
    """Bring a value of that layout to ``[b, channels, *spatial]``."""
    return value.permute(image_order(layout))


def sizes_of_one_row(layouts: Sequence[BatchLayout], dynamic: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Expr]:
    """Choose dynamic sizes with which tensors have one row for each sample, such as 3 in front of ``size - 2``; else 1."""
    ones = dict.fromkeys(dynamic, 1)
    wanted = {size for layout in layouts for size in layout.sizes[1:]}
    choices = itertools.chain(
        ([size] * len(dynamic) for size in _SIZES), itertools.product(_SIZES, repeat=len(dynamic))
    )
    for chosen in itertools.islice(choices, len(_SIZES) * (len(_SIZES) + 1)):
        sizes = dict(zip(dynamic, chosen, strict=True))
        with contextlib.suppress(ZeroDivisionError):
            if all(size.subs(sizes) == 1 for size in wanted):
                return sizes
    return ones
