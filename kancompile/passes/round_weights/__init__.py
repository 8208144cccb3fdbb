"""Round the weights of every layer, first to last, each on what the layers before it really hand over.

    y = V q + b   (float V, table codes q)     ->     y = scale * (C q + B)     (integer C and B)

Layer by layer: the features of a layer are computed by the program in which all earlier layers are rounded already, so
that its rounding can make up for their errors; where asked for, ``V`` first becomes what gives the float outputs on those
features (``drift``). The bias joins the integer sum in units of the scale. Layers that do not depend on each other are
rounded by one process each, where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from kancompile.ir import Contraction, Layer, Program, Values
from kancompile.passes.round_weights.drift import FloatOutputs
from kancompile.passes.round_weights.integers import integer_modules, merge_groups
from kancompile.passes.round_weights.limit_pairs import cost_of_pairs
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.pair_products import layer_limits, prove_layer
from kancompile.passes.round_weights.reconstruct_blocks import blocks_of, reconstruct_block, with_one_end
from kancompile.passes.round_weights.rows import layer_problems
from kancompile.passes.round_weights.solved_layer import SolvedLayer, fit_pairs, solve_layer
from kancompile.passes.round_weights.turns import turns
from kancompile.passes.rounding_methods import Brecq, Rounded, RoundingProblem, snap_scales
from kancompile.processes import dealt, process_count
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
        numbers = {layer: number for number, layer in enumerate(layers)}
        planned = turns(program, layers, process_count())
        floats = None
        if exact is not None:
            order = (layer for turn in planned for layer in turn)
            drifting = {one: self._generator(numbers[one]) for one in order if self.options(one.name).makes_up}
            floats = FloatOutputs(exact, program, drifting, x, self.seed + 1)
        problems: dict[str, RoundingProblem] = {}
        rounded: dict[str, Rounded] = {}
        for turn in track(planned, "rounding weights"):
            stated: dict[Layer, tuple[RoundingProblem, ...]] = {}
            lines: dict[Layer, list[str]] = {}
            for layer in turn:
                options = self.options(layer.name)
                generator = self._generator(numbers[layer])
                parts, lines[layer] = layer_problems(program, layer, x, options, generator), []
                if floats is not None and options.makes_up:
                    changed, line = floats.make_up(program.node(layer.contraction, Contraction), layer, parts)
                    weights = changed.flat_weight()
                    parts = tuple(replace(one, weight=weight) for one, weight in zip(parts, weights, strict=True))
                    program = program.replace_modules({layer.contraction: changed})
                    reference = reference.replace_modules({layer.contraction: changed})
                    lines[layer] = [line]
                stated[layer] = parts
            for layer, solved in zip(turn, self._solved(reference, turn, stated, numbers), strict=True):
                options, parts = self.options(layer.name), stated[layer]
                rounded[layer.name], notes = merge_groups(solved.parts), [*lines[layer], *solved.notes]
                if len(parts) == 1 and layer.uses == 1:
                    # without what was kept beside it, which only the process that solved it has
                    problems[layer.name] = replace(parts[0]) if len(turn) > 1 else parts[0]
                elif isinstance(options.method, Brecq):
                    apart = f"its {len(parts)} channel groups are rounded apart"
                    why = apart if len(parts) > 1 else f"it is used {layer.uses} times, in no one block"
                    notes.append(
                        f"layer {layer.name!r}: rounded by the first stage of brecq alone, since {why}; no block "
                        "reconstruction"
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
                options, own = self.options(layer.name), (problems[layer.name],)
                final = improved[layer.name]
                if options.shares_scale:
                    final = snap_scales(problems[layer.name], final)
                solved = SolvedLayer([final], options.bits, ())
                solved = fit_pairs(reference, layer, own, solved, options, generator)
                modules |= integer_modules(reference, layer, solved.parts[0], solved.bits, options.shares_scale)
                notes += solved.notes
            program = program.replace_modules(modules, notes)
        return program

    def _solved(
        self,
        reference: Program,
        turn: Sequence[Layer],
        stated: Mapping[Layer, Sequence[RoundingProblem]],
        numbers: Mapping[Layer, int],
    ) -> list[SolvedLayer]:
        """Solve the layers of a turn: one by all processes together, several by one process each."""

        def solve(layer: Layer) -> SolvedLayer:
            start = partial(self._generator, numbers[layer])
            return solve_layer(reference, layer, stated[layer], self.options(layer.name), start)

        if len(turn) == 1:
            return [solve(turn[0])]
        return [SolvedLayer.of_tensors(found) for found in dealt(turn, lambda layer: solve(layer).as_tensors())]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000003 * number)


def _reads_tables(program: Program, layer: Layer) -> bool:
    return program.is_float(layer) and all(expansion.yields_codes for expansion in program.expansions(layer))


__all__ = ["RoundWeights", "RoundingOptions", "cost_of_pairs", "layer_limits", "prove_layer"]
