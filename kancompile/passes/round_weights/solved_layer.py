"""Solve the rounding problems of one layer, and write what came out as tensors, which travel between processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kancompile.ir import IntegerContraction, Layer, Program, layer_tables
from kancompile.passes.round_weights.adjacent_pairs import AdjacentPairs
from kancompile.passes.round_weights.alternatives import best_method
from kancompile.passes.round_weights.integers import integer_modules, merge_groups
from kancompile.passes.round_weights.limit_pairs import limit_layer
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.pair_products import layer_pairs
from kancompile.passes.rounding_methods import (
    Gptq,
    Rounded,
    RoundingProblem,
    Uniform,
    Width,
    objective,
    settle_group_scales,
    stored_bits,
    with_guard,
)
from kancompile.processes import bytes_as_tensor


@dataclass(frozen=True)
class SolvedLayer:
    """The rounding problems of one layer, solved.

    Attributes:
        parts: one rounding for each.
        bits: of the weights.
        notes: lines for the report.
    """

    parts: list[Rounded]
    bits: Width
    notes: tuple[str, ...]

    def as_tensors(self) -> tuple[Tensor, ...]:
        """Write it as tensors, the first of them JSON in UTF-8."""
        said = {
            "bits": self.bits,
            "notes": self.notes,
            "parts": [{"notes": one.notes, "group_sizes": one.group_sizes} for one in self.parts],
        }
        written = bytes_as_tensor(json.dumps(said).encode())
        none = torch.empty(0)
        return written, *(
            tensor
            for one in self.parts
            for tensor in (one.codes, one.scale, one.offset, none if one.column_scale is None else one.column_scale)
        )

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor]) -> SolvedLayer:
        """Read what :meth:`as_tensors` has written."""
        said, found = json.loads(tensors[0].numpy().tobytes()), []
        for number, part in enumerate(said["parts"]):
            codes, scale, offset, fraction = tensors[1 + 4 * number : 5 + 4 * number]
            notes, sizes = tuple(part["notes"]), tuple(part["group_sizes"])
            found.append(Rounded(codes, scale, offset, notes, sizes, fraction if len(fraction) else None))
        return SolvedLayer(found, said["bits"], tuple(said["notes"]))


def solve_layer(
    program: Program,
    layer: Layer,
    problems: Sequence[RoundingProblem],
    options: RoundingOptions,
    generator: Callable[[], torch.Generator],
) -> SolvedLayer:
    """Round one layer by the method asked for, or by another one where that limits the layer and others may be tried.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        problems: its rounding problems.
        options: of the layer.
        generator: starts the layer's random numbers anew, for each attempt the same ones.
    """
    solved = round_layer(problems, options, generator())
    others, is_convolution = options.alternatives, program.contraction(layer).geometry is not None
    if is_convolution:  # columns are alike there
        others = {name: method for name, method in others.items() if isinstance(method, Gptq)}
    if others:
        better = best_method(problems, solved.parts, others, generator())
        if better is not None:
            options = replace(options, method_name=better[0], method=better[1], alternatives={})
            solved = round_layer(problems, options, generator())
            solved = replace(solved, notes=(*solved.notes, f"layer {layer.name!r}: {better[2]}"))
    polishing = None if isinstance(options.method, Uniform) else Gptq()
    solved = fit_pairs(program, layer, problems, solved, options, generator(), polishing)
    if options.granularity == "channel" or not is_convolution:
        return solved
    note = (
        f"layer {layer.name!r}: one weight scale for each output channel, not for each {options.granularity}, since an integer "
        "convolution has no more"
    )
    return replace(solved, notes=(*solved.notes, note))


def round_layer(
    problems: Sequence[RoundingProblem], options: RoundingOptions, generator: torch.Generator
) -> SolvedLayer:
    """Round one layer with one method, and say how it compares with rounding to nearest.

    The better of the two on the calibration data is returned, and a note says so where that is not the method asked for.
    """
    parts = [with_guard(options.method)(problem, generator) for problem in problems]
    if options.shares_scale:
        parts = [
            settle_group_scales(problem, part, options.method) if len(part.group_sizes) > 1 else part
            for problem, part in zip(problems, parts, strict=True)
        ]
    what = f"layer {problems[0].layer!r}: {options.weights} by {options.method_name}"
    if isinstance(options.method, Uniform):
        errors = [objective(problem, part) for problem, part in zip(problems, parts, strict=True)]
        notes = [f"{what}, mean squared output error {sum(errors) / len(errors):.4g}"]
    else:
        notes = [f"{what}, {line}" for line in dict.fromkeys(line for part in parts for line in part.notes)]
    return SolvedLayer(parts, options.bits, tuple(notes))


def fit_pairs(
    program: Program,
    layer: Layer,
    problems: Sequence[RoundingProblem],
    solved: SolvedLayer,
    options: RoundingOptions,
    generator: torch.Generator,
    polishing: Gptq | None = None,
) -> SolvedLayer:
    """Make sums of two neighboring products fit int16 where that is asked for; they always do below 8 bits.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        problems, solved: its rounding problems and their solution.
        options: of the layer.
        generator: for another rounding, where that is needed.
        polishing: see :func:`limit_layer`; not after a block was reconstructed, whose objective is another one.
    """
    if not options.int16_pairs or stored_bits(solved.bits) < 8:
        return solved

    def pairs_of(parts: Sequence[Rounded]) -> Sequence[AdjacentPairs]:
        modules = integer_modules(program, layer, merge_groups(parts), solved.bits)
        contraction = modules[layer.contraction]
        assert isinstance(contraction, IntegerContraction)
        return layer_pairs(contraction, layer_tables(program.replace_modules(modules), layer))

    def again(bits: int) -> list[Rounded]:
        return round_layer([replace(problem, bits=bits) for problem in problems], options, generator).parts

    limited = limit_layer(problems, solved.parts, pairs_of, again, polishing)
    if limited is None:
        return solved
    return SolvedLayer(limited.parts, limited.bits, (*solved.notes, f"layer {layer.name!r}: {limited.note()}"))
