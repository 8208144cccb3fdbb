"""State the rounding of a layer as that of matrix products: what its outputs see, one row of features for each.

    y[o] = sum over columns and taps of V[o, column, tap] * (q - z)[column, tap] + b

A linear layer is one problem, whose rows are read in chunks as often as needed. Rows of a convolution are what a sample of output
pixels sees, drawn evenly from all calibration images, so that memory is bounded; every channel group is a problem of its own.
Features are the codes less the code of 0: then padding is 0 whatever the weights are rounded to, and a method may rescale
columns about it. All methods work on these problems unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import (
    Contraction,
    JointTable,
    Layer,
    PatchSampler,
    Program,
    TableExpansion,
    Values,
    branch_of_column,
    columns_of_groups,
    convolution_columns,
    group_order,
    layer_tables,
    split_groups,
    tied_columns,
)
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.rounding_methods import FeatureSource, RoundingProblem, Width
from kancompile.processes import dealt

_ROWS = 1 << 14
_BYTES = 1 << 29
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Pixels:
    """Output pixels of a convolution, one for each row of its problems.

    Attributes:
        sampler: finds what they see.
        image: int64 ``[r]``, ascending: ``sample * uses + use`` is what a use of the layer reads of a sample.
        position: int64 ``[r]``, in the flattened output.
    """

    sampler: PatchSampler
    image: Tensor
    position: Tensor

    def chunks(self, uses: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield numbers of up to ``size`` samples, a mask of their pixels, and these pixels' images in a trace of the samples."""
        sample, use = self.image // uses, self.image % uses
        for part in torch.split(sample.unique(), size):
            here = (sample >= part[0]) & (sample <= part[-1])
            yield part, here, use[here] * len(part) + torch.searchsorted(part, sample[here])


def drawn_pixels(
    program: Program,
    layer: Layer,
    x: Values,
    generator: torch.Generator,
    rows: int = _ROWS,
    max_bytes: int = _BYTES,
) -> Pixels | None:
    """Draw the output pixels that a convolution is rounded on, evenly from all images (see :func:`convolution_problems`).

    ``None`` for a linear layer, all rows of which are used.
    """
    contraction = program.node(layer.contraction, Contraction)
    if contraction.geometry is None:
        return None
    features = program.trace(x[:1], layer.expansions)[layer.expansions[0]][1]
    sampler = PatchSampler(contraction.geometry, contraction.kernel, tuple(features.shape[1:-2]))
    element = 2 if contraction.zero_point else 1
    wanted = max(1, min(rows, max_bytes // (contraction.in_columns * sampler.taps * element)))
    return Pixels(sampler, *sampler.draw(len(x) * layer.uses, wanted, generator))


def convolution_problems(
    program: Program,
    layer: Layer,
    x: Values,
    bits: Width,
    generator: torch.Generator,
    rows: int = _ROWS,
    max_bytes: int = _BYTES,
) -> tuple[RoundingProblem, ...]:
    """State the rounding problem of every channel group of a convolution whose earlier layers are rounded.

    Args:
        program: the program.
        layer: the layer.
        x: calibration inputs ``[n, *input_shape]``.
        bits: of the weights.
        generator: draws the output pixels.
        rows: most pixels to use.
        max_bytes: most memory for their features, all groups together.
    """
    contraction = program.node(layer.contraction, Contraction)
    tables, groups = layer_tables(program, layer), contraction.groups
    pixels = drawn_pixels(program, layer, x, generator, rows, max_bytes)
    assert pixels is not None
    order = group_order([(table.n_in, table.k) for table in tables], groups)
    seen = _features(program, layer, x, contraction, pixels)
    branches = columns_of_groups(branch_of_column(tables)[order], groups, contraction.taps)
    ties = columns_of_groups(tied_columns(tables)[order], groups, contraction.taps)
    weights = contraction.flat_weight()
    # a table that several groups share cannot be rescaled for one of them
    own = groups == 1 or not _overlap(ties)
    return tuple(
        RoundingProblem(
            layer.name,
            weight,
            FeatureSource.from_tensor(feature),
            bits,
            (),
            branch,
            tie if own else torch.zeros_like(tie),
        )
        for weight, feature, branch, tie in zip(weights, seen, branches, ties, strict=True)
    )


def _overlap(parts: Sequence[Tensor]) -> bool:
    return sum(len(part.unique()) for part in parts) > len(torch.cat(list(parts)).unique())


def _features(program: Program, layer: Layer, x: Values, contraction: Contraction, pixels: Pixels) -> list[Tensor]:
    """Collect codes less the zero point, ``[r, c / groups * t]`` for each group: int16, or uint8 where that is 0."""
    sampler = pixels.sampler
    size = math.prod(sampler.spatial) * sum(one.n_in * one.k for one in program.expansions(layer))
    chunk = max(1, min(512, _CHUNK_BYTES // (8 * size)))

    def patches_of(samples: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        part, here, local = samples
        traced = program.trace(x[part], layer.expansions)
        columns = convolution_columns([traced[target][1] for target in layer.expansions], contraction.groups)
        patches = sampler.take(columns, local, pixels.position[here], contraction.zero_point)
        if contraction.zero_point:
            patches = patches.to(torch.int16) - contraction.zero_point
        return tuple(split_groups(patches, contraction.groups))

    found = dealt(pixels.chunks(layer.uses, chunk), patches_of)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


CHUNK = 512
"""Samples whose features of a linear layer make a chunk."""
_KEPT_BYTES = 1 << 30


def layer_problems(
    program: Program, layer: Layer, x: Values, options: RoundingOptions, generator: torch.Generator
) -> tuple[RoundingProblem, ...]:
    """State the rounding problems of one layer: one, or one for each channel group of a convolution."""
    if program.contraction(layer).geometry is not None:
        return convolution_problems(program, layer, x, options.bits, generator)
    return (layer_problem(program, layer, x, options),)


def layer_problem(program: Program, layer: Layer, x: Values, options: RoundingOptions) -> RoundingProblem:
    """State the rounding problem of one layer of a program whose earlier layers are rounded."""
    tables = layer_tables(program, layer)
    ties, start = tied_columns(tables), 0
    for table in tables:
        columns = slice(start, start + table.n_in * table.k)
        start = columns.stop
        if isinstance(table, JointTable) and table.made_of is not None:
            ties[columns] = ties[columns].min()  # what it is made of cannot be rescaled column by column
    return RoundingProblem(
        layer.name,
        program.node(layer.contraction, Contraction).weight,
        layer_features(program, layer, x),
        options.bits,
        group_sizes(tables, options),
        branch_of_column(tables),
        ties,
    )


def layer_features(program: Program, layer: Layer, x: Values) -> FeatureSource:
    """Give the table codes that reach a layer, uint8 ``[n *, c]``; recomputed chunk by chunk where they are many."""
    n, columns = len(x), _columns(program, layer, x[:1]).shape
    rows = n * columns[0]

    def chunks() -> Iterator[Tensor]:
        for (codes,) in dealt(x.split(CHUNK), lambda part: (_columns(program, layer, part),)):
            yield codes

    if rows * columns[1] <= _KEPT_BYTES:
        kept = list(chunks())
        return FeatureSource(lambda: iter(kept), rows, columns[1])
    return FeatureSource(chunks, rows, columns[1])


def _columns(program: Program, layer: Layer, x: Values) -> Tensor:
    traced = program.trace(x, layer.expansions)
    features = [traced[target][1].flatten(-2) for target in layer.expansions]
    return torch.cat(features, dim=-1).flatten(0, -2)


def group_sizes(tables: Sequence[TableExpansion], options: RoundingOptions) -> tuple[int, ...]:
    """Divide the columns of a layer into scale groups."""
    sizes: list[int] = []
    for table in tables:
        columns = table.n_in * table.k
        if options.granularity == "group" and options.group_size is not None:
            step = options.group_size * table.k
            sizes += [min(step, columns - start) for start in range(0, columns, step)]
        else:
            sizes.append(columns)
    return (sum(sizes),) if options.granularity == "channel" else tuple(sizes)
