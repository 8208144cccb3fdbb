"""Round the weights of every layer, first to last, each on what the layers before it really hand over.

    y = V q + b   (float V, table codes q)     ->     y = scale * (C q + B)     (integer C and B)

Layer by layer: the features of a layer are computed by the program in which all earlier layers are rounded already, so
that its rounding can make up for their errors; where asked for, ``V`` first becomes what gives the float outputs on those
features (``drift``). The bias joins the integer sum in units of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kancompile.ir import Contraction, IntegerContraction, Layer, Program, Values, layer_tables
from kancompile.passes.round_weights.alternatives import best_method
from kancompile.passes.round_weights.drift import FloatOutputs
from kancompile.passes.round_weights.integers import integer_modules, merge_groups
from kancompile.passes.round_weights.limit_pairs import cost_of_pairs, limit_layer
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.pair_products import AdjacentPairs, layer_limits, layer_pairs, prove_layer
from kancompile.passes.round_weights.reconstruct_blocks import blocks_of, reconstruct_block, with_one_end
from kancompile.passes.round_weights.rows import layer_problems
from kancompile.passes.rounding_methods import (
    Brecq,
    Gptq,
    Rounded,
    RoundingProblem,
    Uniform,
    Width,
    objective,
    settle_group_scales,
    snap_scales,
    stored_bits,
    with_guard,
)
from kancompile.progress import track


@dataclass(frozen=True)
class RoundWeights:
    """Round every contraction that reads tables; rounded ones and those of float layers stay.

    Attributes:
        options: gives the options of a layer by its name.
        seed: of the generator that methods draw from; each layer has its own.
        block_size: consecutive layers that BRECQ reconstructs together.
    """

    options: Callable[[str], RoundingOptions]
    seed: int = 0
    block_size: int = 2

    name = "round-weights"

    def __call__(self, program: Program, x: Values, exact: Program | None = None) -> Program:
        """Return the rounded program.

        Args:
            program: a tabulated program.
            x: calibration inputs ``[n, *input_shape]``.
            exact: the float program that it was made of, where weights are to make up for drift.
        """
        reference = tabulated = program
        layers = [layer for layer in program.layers() if _reads_tables(program, layer)]
        floats = None
        if exact is not None:
            drifting = {one: self._generator(n) for n, one in enumerate(layers) if self.options(one.name).makes_up}
            floats = FloatOutputs(exact, program, drifting, x, self.seed + 1)
        problems: dict[str, RoundingProblem] = {}
        rounded: dict[str, Rounded] = {}
        for number, layer in enumerate(track(layers, "rounding weights")):
            options = self.options(layer.name)
            stated = layer_problems(program, layer, x, options, self._generator(number))
            if floats is not None and options.makes_up:
                changed, line = floats.make_up(program.node(layer.contraction, Contraction), layer, stated)
                weights = changed.flat_weight()
                stated = tuple(replace(one, weight=weight) for one, weight in zip(stated, weights, strict=True))
                program = program.replace_modules({layer.contraction: changed}, [line])
                reference = reference.replace_modules({layer.contraction: changed})
            solved = round_layer(stated, options, self._generator(number))
            others = options.alternatives
            if program.contraction(layer).geometry is not None:
                others = {
                    name: method for name, method in others.items() if isinstance(method, Gptq)
                }  # columns are alike there
            if others:
                better = best_method(stated, solved.parts, others, self._generator(number))
                if better is not None:
                    options = replace(options, method_name=better[0], method=better[1], alternatives={})
                    solved = round_layer(stated, options, self._generator(number))
                    solved = replace(solved, notes=(*solved.notes, f"layer {layer.name!r}: {better[2]}"))
            polishing = None if isinstance(options.method, Uniform) else Gptq()
            solved = fit_pairs(reference, layer, stated, solved, options, self._generator(number), polishing)
            rounded[layer.name], notes = merge_groups(solved.parts), list(solved.notes)
            if options.granularity != "channel" and program.contraction(layer).geometry is not None:
                notes.append(
                    f"layer {layer.name!r}: one weight scale for each output channel, not for each {options.granularity}, "
                    "since an integer convolution has no more"
                )
            if len(stated) == 1 and layer.uses == 1:
                problems[layer.name] = stated[0]
            elif isinstance(options.method, Brecq):
                apart = f"its {len(stated)} channel groups are rounded apart"
                why = apart if len(stated) > 1 else f"it is used {layer.uses} times, in no one block"
                notes.append(
                    f"layer {layer.name!r}: rounded by the first stage of brecq alone, since {why}; no block reconstruction"
                )
            modules = integer_modules(reference, layer, rounded[layer.name], solved.bits, options.shares_scale)
            program = program.replace_modules(modules, notes)
        # layers of several problems or uses keep what their own reconstruction gave
        learned = [
            layer for layer in layers if layer.name in problems and isinstance(self.options(layer.name).method, Brecq)
        ]
        blocks = [part for block in blocks_of(learned, self.block_size) for part in with_one_end(program, block)]
        for number, block in enumerate(track(blocks, "reconstructing blocks")):
            method = self.options(block[0].name).method
            assert isinstance(method, Brecq)
            generator = self._generator(len(layers) + number)
            improved = reconstruct_block(program, tabulated, reference, block, problems, rounded, x, method, generator)
            modules, notes = {}, [improved[block[-1].name].notes[-1]]
            for layer in block:
                options, stated = self.options(layer.name), (problems[layer.name],)
                final = improved[layer.name]
                if options.shares_scale:
                    final = snap_scales(problems[layer.name], final)
                solved = SolvedLayer([final], options.bits, ())
                solved = fit_pairs(reference, layer, stated, solved, options, generator)
                modules |= integer_modules(reference, layer, solved.parts[0], solved.bits, options.shares_scale)
                notes += solved.notes
            program = program.replace_modules(modules, notes)
        return program

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000003 * number)


def _reads_tables(program: Program, layer: Layer) -> bool:
    return program.is_float(layer) and all(expansion.yields_codes for expansion in program.expansions(layer))


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


__all__ = ["RoundWeights", "RoundingOptions", "cost_of_pairs", "layer_limits", "prove_layer"]
