"""Write a convolution as a matrix product at some of its output pixels: what each of them sees, one row for each.

    y[o] = sum over columns and taps of weight[o, column, tap] * patch[column, tap]

Calibration needs no more than a sample of the pixels, and with rows instead of images everything that works on linear
layers (moments, rounding, measured errors) works on convolutions. Row order inside a patch is that of the weight: columns
major, taps minor. Shapes: ``r`` rows, ``t`` taps, ``c`` columns of all groups together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PatchSampler:
    """Where the output pixels of a convolution find their inputs.

    Attributes:
        geometry, kernel: of the convolution.
        spatial: spatial shape of its input.
    """

    geometry: Geometry
    kernel: tuple[int, ...]
    spatial: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Number of output pixels of one image."""
        return math.prod(self.geometry.out_size(self.spatial, self.kernel))

    def draw(self, images: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw output pixels evenly over the images, none twice.

        Args:
            images: how many there are.
            rows: pixels wanted.
            generator: draws.

        Returns:
            number of the image and of the output pixel, int64 ``[r]`` each, images ascending; ``r`` is at most ``rows``.
        """
        if rows < images:
            chosen = torch.randperm(images, generator=generator)[:rows].sort().values
            return chosen, torch.randint(self.positions, (rows,), generator=generator)
        each = min(self.positions, rows // images)
        order = torch.rand(images, self.positions, generator=generator).argsort(1)[:, :each]
        return torch.arange(images).repeat_interleave(each), order.flatten()

    def take(self, values: Tensor, image: Tensor, position: Tensor, outside: float) -> Tensor:
        """Collect what output pixels see.

        Args:
            values: ``[b, *spatial, m]``, any type.
            image, position: from :meth:`draw`.
            outside: value of pixels outside the image.

        Returns:
            ``[r, t, m]`` of the same type.
        """
        sides = [side for pad in reversed(self.geometry.padding) for side in (pad, pad)]
        padded = nn.functional.pad(values, [0, 0, *sides], value=outside).flatten(1, -2)
        return padded[image[:, None], self._offsets()[position]]

    def _offsets(self) -> Tensor:
        """Place of every tap of every output pixel in the flattened padded image, int64 ``[positions, t]``."""
        geometry = self.geometry
        padded = [size + 2 * pad for size, pad in zip(self.spatial, geometry.padding, strict=True)]
        out_size = geometry.out_size(self.spatial, self.kernel)
        total = torch.zeros(1, 1, dtype=torch.int64)
        for axis, size in enumerate(padded):
            start = torch.arange(out_size[axis]) * geometry.stride[axis]
            tap = torch.arange(self.kernel[axis]) * geometry.dilation[axis]
            step = start[:, None] + tap  # [out, kernel] along this axis
            total = (total * size)[:, None, :, None] + step[None, :, None, :]
            total = total.flatten(2, 3).flatten(0, 1)
        return total


def split_groups(patches: Tensor, groups: int) -> list[Tensor]:
    """Bring patches ``[r, t, c]`` into the order of the weight: ``[r, c / groups * t]`` for each group."""
    rows, taps, _ = patches.shape
    return list(patches.reshape(rows, taps, groups, -1).permute(2, 0, 3, 1).flatten(2))


def flat_weight(weight: Tensor, groups: int) -> list[Tensor]:
    """View a weight ``[n_out, c / groups, *kernel]`` as ``[n_out / groups, c / groups * t]`` for each group."""
    return list(weight.reshape(groups, weight.shape[0] // groups, -1))


def columns_of_groups(of_column: Tensor, groups: int, taps: int) -> list[Tensor]:
    """Repeat what belongs to a column, ``[c]``, for every tap: ``[c / groups * t]`` for each group."""
    return list(of_column.reshape(groups, -1).repeat_interleave(taps, dim=1))


def group_order(sizes: Sequence[tuple[int, int]], groups: int) -> Tensor:
    """Give for every column of a convolution its number when expansions simply stand side by side, int64 ``[c]``.

    Args:
        sizes: ``(n_in, k)`` of every expansion.
        groups: of the convolution.
    """
    parts, start = [], 0
    for n_in, k in sizes:
        parts.append(torch.arange(start, start + n_in * k).reshape(groups, -1))
        start += n_in * k
    return torch.cat(parts, dim=1).flatten()


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image; one number for each spatial dimension, padding the same on both sides.

    Attributes:
        stride, padding, dilation: as in ``torch.nn.functional.conv2d``.
        groups: independent parts of the channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        moves = f"stride {self.stride}, padding {self.padding}, dilation {self.dilation}"
        return f"{moves}, {self.groups} group(s)"

    @property
    def pads(self) -> bool:
        """Whether border pixels see values from outside the image."""
        return any(self.padding)

    def out_size(self, spatial: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Give the spatial shape of the output for an input of shape ``spatial``."""
        sides = zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * pad - hold * (side - 1) - 1) // step + 1 for size, side, step, pad, hold in sides)
