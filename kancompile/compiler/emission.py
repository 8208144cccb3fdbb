"""Choose a target by name, check that it can do what a recipe asks for, and write a lowered program as its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kancompile.compiler.manifest import metadata_of
from kancompile.errors import KanCompileError
from kancompile.ir import MOST_FILE_BYTES, RECURRENCES, Program, Values, attribute, with_history
from kancompile.passes import GuardNaN, LookUpMembers, QuantizeOutputs
from kancompile.progress import Timings
from kancompile.recipe import Recipe, SettledRecipe
from kancompile.targets import TARGETS, Target


def target_named(name: str) -> Target:
    """Return a target by its name.

    Raises:
        KanCompileError: there is none of that name.
    """
    if name not in TARGETS:
        raise KanCompileError(f"target {name!r} is unknown, expected one of {sorted(TARGETS)!r}")
    return TARGETS[name]


def targets_named(names: Sequence[str]) -> list[Target]:
    """Return targets by their names, ``"all"`` for all of them, each once; those that change the program come last.

    Raises:
        KanCompileError: there is none of that name.
    """
    wanted = [name for given in names for name in (TARGETS if given == "all" else (given,))]
    return sorted((target_named(name) for name in dict.fromkeys(wanted)), key=lambda target: target.quantized_outputs)


def check_target(target: Target, recipe: Recipe) -> None:
    """Refuse, before any work starts, a recipe that a target cannot fulfil.

    Raises:
        KanCompileError: it does not serve the processors, or its files take no fixed batch size.
    """
    if recipe.cpu not in target.cpus:
        raise KanCompileError(
            f"target {target.name!r}: cpu is {recipe.cpu!r}, expected one of {list(target.cpus)!r}; "
            f"the nearest recipe that works has cpu = {target.cpus[0]!r}"
        )
    if recipe.guard_nan == "on" and not target.guards_nan:
        raise KanCompileError(
            f"target {target.name!r}: guard_nan is 'on', expected 'off', since its files have no operators that find NaN; look "
            "for it in front of the model"
        )
    if recipe.batch is not None and not target.takes_batch:
        raise KanCompileError(
            f"target {target.name!r}: batch is {recipe.batch}, but its files take any; leave it unset"
        )


def check_file_size(target: Target, program: Program) -> None:
    """Refuse, before anything is calibrated, constants that one file of a target does not hold.

    Args:
        target: whose file it becomes.
        program: the captured one; what stands beside its layers stays as it is.

    Raises:
        KanCompileError: they take more than 2 GB, and the target has no second file for them.
    """
    kept = {str(node.target) for node in program.graph_module.graph.nodes if node.op == "get_attr"}
    sizes = {name: _bytes_of(attribute(program.graph_module, name)) for name in kept}
    if sum(sizes.values()) > MOST_FILE_BYTES and not target.external_data:
        largest = max(sizes, key=lambda name: sizes[name])
        raise KanCompileError(
            f"target {target.name!r}: found {sum(sizes.values()):,} bytes of constants outside the KAN layers ({largest!r} has "
            f"{sizes[largest]:,}), expected at most {MOST_FILE_BYTES:,}, which is what one file holds; compile for 'ort-cpu', "
            "whose large tensors stand in a second file, or the part of the model without it"
        )


def _bytes_of(value: Tensor | nn.Module) -> int:
    """Count the bytes of a constant, or of all those of a part that stays as it is, such as a loop's body."""
    return value.nbytes if isinstance(value, Tensor) else sum(one.nbytes for one in value.state_dict().values())


def with_rows_of(target: Target, recipe: SettledRecipe, tabulated: Callable[[SettledRecipe], Program]) -> SettledRecipe:
    """Give layers that chose finer tables than a target's files hold the finest that these do; a recipe's own rows stay.

    Args:
        target: whose file it becomes.
        recipe: the choices.
        tabulated: gives the program by a recipe with its tables, before weights are rounded.
    """
    most = target.most_levels
    if most is None:
        return recipe
    program = tabulated(recipe)
    finer = [
        layer.name
        for layer in program.layers()
        if recipe[layer.name].levels is None
        and any(table.index.levels > most for table in program.tables(layer).values())
    ]
    return recipe.with_overrides({name: {"levels": most} for name in finer}) if finer else recipe


def write(target: Target, program: Program, facts: Mapping[str, Any], recipe: Recipe) -> bytes:
    """Write a lowered program as the bytes of a target's file.

    Raises:
        KanCompileError: the target cannot express the inputs, the outputs or a layer; its name, the reason and the nearest recipe
            are given.
    """
    check_target(target, recipe)
    if not target.several_tensors and program.declared is not None:
        inputs = [f"{one.text()} {str(one.dtype).removeprefix('torch.')}" for one in program.interface.inputs]
        outputs = ", ".join(program.interface.outputs)
        raise KanCompileError(
            f"target {target.name!r}: found the inputs {', '.join(inputs)} and the outputs {outputs}, expected one float32 input "
            "of fixed shape and one output; compile for an ONNX target, or the part of the model that has such"
        )
    operators = {*map(str, RECURRENCES.values()), "while_loop"}
    recurrent = [part for part in program.unrecognized if part.operator in operators]
    if recurrent and not target.recurrent_layers:
        found = ", ".join(f"{part.node}{f' ({part.source})' if part.source else ''}" for part in recurrent)
        raise KanCompileError(
            f"target {target.name!r}: found recurrent layers or loops, which compute in float: {found}; expected KAN layers and "
            "ordinary ones; compile for 'ort-cpu', or the part of the model behind them"
        )
    for layer in facts["layers"]:
        if layer["weight_bits"] not in (*target.weight_bits, 16, 32):
            nearest = min((bits for bits in target.weight_bits if bits > layer["weight_bits"]), default=8)
            raise KanCompileError(
                f"target {target.name!r}, layer {layer['name']!r}: weights of {layer['weight_bits']} bits cannot be stored, "
                f"expected one of {list(target.weight_bits)!r}; use weight_bits = {nearest} for this layer"
            )
    return target.emit(program, metadata_of(facts, recipe.has_short_metadata), recipe.storage, recipe.batch)


def for_target(target: Target, lowered: Program, x: Values, timings: Timings, recipe: Recipe) -> Program:
    """Rewrite a lowered program as its target, and what the recipe says about its inputs, ask for."""
    if recipe.guard_nan == "on" and target.guards_nan:
        lowered = GuardNaN()(lowered)
    if not target.joint_tables:
        lowered = LookUpMembers(target.name)(lowered)
    if not target.quantized_outputs:
        return lowered
    quantized = timings.measure(QuantizeOutputs.name, lambda: QuantizeOutputs()(lowered, x))
    return with_history(QuantizeOutputs.name, lowered, quantized)
