"""Lower a captured program by a recipe: the passes in their order."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kancompile.errors import KanCompileError
from kancompile.ir import Program, Values, check, with_history
from kancompile.passes.absorb_plain_layers import AbsorbPlainLayers
from kancompile.passes.center_steps import CenterSteps
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.lower_to_polynomials import LowerToPolynomials, lower_exactly
from kancompile.passes.recently_used import RecentlyUsed
from kancompile.passes.reduce_functions import BALANCE, JoinInputs, JoinOptions, ReduceFunctions
from kancompile.passes.round_float_weights import RoundFloatWeights
from kancompile.passes.round_to_16_bits import RoundTo16Bits
from kancompile.passes.round_weights import RoundingOptions, RoundWeights, prove_layer
from kancompile.passes.rounding_methods import method_named, quick_methods
from kancompile.passes.split_branches import SplitBranches
from kancompile.passes.tabulate_expansions import KnownTables, TableOptions, TabulateExpansions
from kancompile.passes.uniform_splines import WriteUniformSplines, layers_with_splines
from kancompile.progress import Timings, say
from kancompile.recipe import CPU_PRESETS, WEIGHT_ONLY, FunctionCosts, LayerRecipe, Recipe, SettledRecipe

WIDE_TOLERANCE = 2.0**-17
"""Relative error of the functions of a 16-bit layer: half a step of its codes."""
_KEPT_FORMS = 2
_SILENT_SECONDS = 1.0  # a pass that has nothing to do and ends sooner says nothing

Stage = tuple[str, tuple[str, ...], Callable[[Program], Program]]
"""Name of a pass, the precisions that need it, and what runs it."""
FormKey = tuple[FunctionCosts, tuple[tuple[str, float, bool], ...]]
"""What the form of every layer's functions depends on: costs, arithmetic, function error, whether branches are split."""


class Lowering:
    """Lowers one program by any number of recipes; equal recipes give equal bits, whatever was lowered before.

    What recipes agree on is done once: the form of the layers' functions, the last two of which are kept, and what is
    measured of their tables (``KnownTables``).
    """

    def __init__(self, program: Program, x: Values, seed: int = 0, device: str = "cpu") -> None:
        """Take what all recipes share.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
            seed: of every random choice.
            device: where rounding methods keep their matrices.
        """
        self.program, self.x, self.seed, self.device = program, x, seed, device
        self._forms: RecentlyUsed[FormKey, tuple[Program, KnownTables]] = RecentlyUsed(_KEPT_FORMS)

    def settled(self, recipe: Recipe) -> SettledRecipe:
        """Settle a recipe for the layers of the program."""
        return recipe.settled(layer.name for layer in self.program.layers())

    def __call__(self, recipe: SettledRecipe, timings: Timings | None = None) -> Program:
        """Run the passes of a recipe.

        Args:
            recipe: the choices.
            timings: collects the seconds of every pass.

        Raises:
            KanCompileError: the program cannot be lowered so.
        """
        timings = timings or Timings()
        program, known = self._form(recipe, timings)
        stages = self._table_stages(recipe, known) + self._rounding_stages(recipe)
        program = _run(stages, program, recipe, timings)
        if CPU_PRESETS[recipe.whole.cpu].int16_pairs:
            check_pairs(program)
        return program

    def functions(self, recipe: SettledRecipe) -> Program:
        """Give the program in the form that a recipe tabulates: in float, with fewer functions, branches split."""
        return self._form(recipe, Timings())[0]

    def tabulated(self, recipe: SettledRecipe, timings: Timings) -> Program:
        """Give the program with its tables, which lowering it finds again, before weights are rounded."""
        program, known = self._form(recipe, timings)
        return _run(self._table_stages(recipe, known), program, recipe, timings)

    def _form(self, recipe: SettledRecipe, timings: Timings) -> tuple[Program, KnownTables]:
        layers = [recipe[layer.name] for layer in self.program.layers()]
        forms = tuple((layer.arithmetic, layer.shared_error, layer.granularity == "branch") for layer in layers)
        key = (recipe.whole.costs.functions, forms)

        def make() -> tuple[Program, KnownTables]:
            program = _run(self._function_stages(recipe), self.program, recipe, timings)
            # where the passes had nothing to do, forms are the very same graph
            alike = (known for other, known in self._forms if other.graph_module is program.graph_module)
            return program, next(alike, None) or KnownTables()

        return self._forms.get(key, make)

    def _function_stages(self, recipe: SettledRecipe) -> list[Stage]:
        """List the passes that give the functions of layers another form, which does not depend on levels and bits."""
        x, costs = self.x, recipe.whole.costs.functions

        def function_error(name: str) -> float:
            layer = recipe[name]
            return layer.shared_error if layer.arithmetic == "int8" and layer.granularity != "branch" else 0.0

        exact, wide, tables = (_with_precision(recipe, precision) for precision in ("float", "int16", "int8"))
        bytes_only = _with_precision(recipe, WEIGHT_ONLY)

        def in_polynomials(name: str) -> bool:
            return wide(name) or bytes_only(name)

        def polynomials(stage: Program) -> Program:
            written = layers_with_splines(stage)
            applies = LowerToPolynomials(
                WIDE_TOLERANCE, applies=lambda name: in_polynomials(name) and name not in written, costs=costs
            )
            return applies(stage, x)

        in_branches = SplitBranches(lambda name: recipe[name].granularity == "branch")
        return [
            (LowerToPolynomials.name, ("float",), lambda stage: lower_exactly(stage, x, exact, costs)),
            (WriteUniformSplines.name, (WEIGHT_ONLY,), lambda stage: WriteUniformSplines(bytes_only, costs)(stage, x)),
            (LowerToPolynomials.name, ("int16", WEIGHT_ONLY), polynomials),
            (RoundFloatWeights.name, (WEIGHT_ONLY,), lambda stage: RoundFloatWeights(bytes_only, self.seed)(stage, x)),
            (RoundTo16Bits.name, ("int16", WEIGHT_ONLY), RoundTo16Bits(in_polynomials)),
            (ReduceFunctions.name, ("int8",), lambda stage: ReduceFunctions(tables, function_error)(stage, x)),
            (SplitBranches.name, ("int8",), in_branches),
        ]

    def _table_stages(self, recipe: SettledRecipe, known: KnownTables) -> list[Stage]:
        """List the passes that make tables of them."""
        x = self.x

        def table_options(name: str) -> TableOptions | None:
            layer = recipe[name]
            if layer.arithmetic != "int8":
                return None
            # methods that compensate their errors leave about as much as nearest rounding with two bits more
            gained = 2 if method_named(layer.rounding_method).compensates else 0
            bits = min(8, layer.bits + gained)
            return TableOptions(
                layer.levels,
                layer.range,  # type: ignore[arg-type]
                layer.percentile,
                bits,
                layer.column_scaling,
                layer.table_bits,
            )

        def join_options(name: str) -> JoinOptions | None:
            layer = recipe[name]
            if layer.arithmetic != "int8" or not layer.joint_error:
                return None
            return JoinOptions(
                layer.joint_error,
                layer.levels,
                layer.range,  # type: ignore[arg-type]
                layer.percentile,
                layer.column_scaling,
                layer.lookup == "joint",
            )

        made_for = recipe.whole.for_batch or recipe.whole.batch
        batch = BALANCE if made_for is None else (made_for,)
        join = JoinInputs(join_options, recipe.whole.costs.look_up, batch=batch, known=known)
        tabulate = TabulateExpansions(table_options, known=known)
        return [
            (JoinInputs.name, ("int8",), lambda stage: join(stage, x)),
            (TabulateExpansions.name, ("int8",), lambda stage: tabulate(stage, x)),
        ]

    def _rounding_stages(self, recipe: SettledRecipe) -> list[Stage]:
        """List the passes that make integers of the weights."""
        x, exact, preset = self.x, self.program, CPU_PRESETS[recipe.whole.cpu]

        def rounding_options(name: str) -> RoundingOptions:
            layer = recipe[name]
            method = method_named(layer.rounding_method, self.device)
            return RoundingOptions(
                method,
                layer.rounding_method,
                layer.weight_bits,
                layer.granularity,
                layer.group_size,
                preset.int16_pairs,
                {name: method_named(name, self.device) for name in alternatives(layer)},
                layer.drift == "on" or (layer.drift == "auto" and layer.bits < 8),
            )

        return [
            (RoundWeights.name, ("int8",), lambda stage: RoundWeights(rounding_options, self.seed)(stage, x, exact)),
            (FuseIndex.name, ("int8",), FuseIndex()),
        ]


def settle(program: Program, x: Values, recipe: Recipe) -> SettledRecipe:
    """Settle a recipe for the layers of a program, ordinary layers that can be absorbed included; every pattern must fit one.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        recipe: the choices.

    Raises:
        KanCompileError: a pattern fits no layer, or the overrides of a layer do not fit together.
    """
    names = [layer.name for layer in AbsorbPlainLayers()(program, x).layers()]
    recipe.check_layers(names)
    return recipe.settled(names)


def prepare(program: Program, x: Values, recipe: SettledRecipe) -> Program:
    """Bring a captured program into the form that integer lowering starts from; its values stay the same up to rounding.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        recipe: the choices; ordinary layers of another precision stay as they are.
    """
    tables = _with_precision(recipe, "int8")
    with torch.no_grad():
        absorbed = AbsorbPlainLayers(tables)(program, x)
        centered = CenterSteps(tables)(absorbed, x)
    check(centered)
    absorbed = with_history(AbsorbPlainLayers.name, program, absorbed)
    return with_history(CenterSteps.name, absorbed, centered)


def lower(program: Program, x: Values, recipe: Recipe, seed: int = 0, device: str = "cpu") -> Program:
    """Run the passes of one recipe over a captured program (see :class:`Lowering`)."""
    lowering = Lowering(program, x, seed, device)
    return lowering(lowering.settled(recipe))


def check_pairs(program: Program) -> None:
    """Refuse a program that processors without VNNI would compute otherwise.

    Raises:
        KanCompileError: sums of two neighboring products of a layer can leave int16.
    """
    for layer in program.layers():
        proof = prove_layer(program, layer)
        if proof is not None and not proof.holds:
            raise KanCompileError(
                f"layer {layer.name!r}: {proof.overflowing} sums of two neighboring products can leave int16 (up to "
                f"{proof.largest}), expected none for processors without VNNI; use 7 weight bits for this layer, or a recipe "
                'with cpu = "x86-vnni" or "arm64"'
            )


def alternatives(layer: LayerRecipe) -> list[str]:
    """Name the methods that may take the place of nearest rounding where a recipe leaves the choice open."""
    if layer.method != "auto" or method_named(layer.rounding_method).compensates or layer.granularity == "group":
        return []
    return quick_methods()


def _with_precision(recipe: SettledRecipe, precision: str) -> Callable[[str], bool]:
    return lambda name: recipe[name].arithmetic == precision


def _run(stages: list[Stage], program: Program, recipe: SettledRecipe, timings: Timings) -> Program:
    precisions = {recipe[layer.name].arithmetic for layer in program.layers()}
    for name, needed, run in stages:
        if precisions.isdisjoint(needed):
            continue
        before, start = program, time.perf_counter()
        with torch.no_grad():
            program = timings.measure(name, lambda: run(before))  # noqa: B023 (called at once)
        seconds = time.perf_counter() - start
        if program is not before or seconds >= _SILENT_SECONDS:
            count = sum(recipe[layer.name].arithmetic in needed for layer in before.layers())
            say(f"{name}: {count} layer{'s' if count != 1 else ''} in {seconds:.1f} s")
        check(program)
        program = with_history(name, before, program)
    return program
