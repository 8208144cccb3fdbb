"""From a trained module to a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from kancompile.compiler import CompiledModel
from kancompile.errors import KanCompileError
from kancompile.ir import IntegerContraction, Program, TableExpansion, check
from kancompile.passes import check_pairs
from kancompile.qat.elastic import ElasticModel
from kancompile.qat.training_module import TrainedModel
from kancompile.recipe import CPU_PRESETS, Recipe


def convert(module: nn.Module, target: str = "ort-cpu", recipe: Recipe | None = None) -> CompiledModel:
    """Write the integers of a trained module as the file of a target.

    Args:
        module: what :func:`kancompile.qat.prepare` returned, on any device.
        target: name of a target.
        recipe: what the module is expected to have been prepared with, as ``CompiledModel.recipe`` holds it; not compared
            where ``None``.

    Raises:
        KanCompileError: the module was not prepared, or with another recipe; the target cannot express the program; trained
            weights of 8 bits may overflow on processors that the recipe names.
    """
    if not isinstance(module, TrainedModel):
        if isinstance(module, ElasticModel):
            raise KanCompileError(
                f"convert: found a module of {len(module.bits)} widths, expected one of them; give module.at(bits), bits one of "
                f"{list(module.bits)!r}"
            )
        raise KanCompileError(
            f"convert: found {type(module).__name__}, expected the module that kancompile.qat.prepare returned; a wrapper such "
            "as DataParallel has it as .module"
        )
    compiled = module.compiled
    if recipe is not None and recipe.canonical_json() != compiled.recipe.canonical_json():
        raise KanCompileError(
            "convert: found a recipe that the module was not prepared with; its bits and rows are part of the module: prepare "
            "another one with this recipe"
        )
    lowered = quantized(module)
    if lowered is not compiled.lowered and CPU_PRESETS[compiled.recipe.cpu].int16_pairs:
        check_pairs(lowered)
    return replace(compiled, lowered=lowered).for_target(target)


def quantized(module: TrainedModel) -> Program:
    """Return the integer program of a module's parameters; without training the very program that it began with.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator.
    """
    module.check_finite()
    lowered = module.compiled.lowered
    changed: dict[str, nn.Module] = {}
    for kind in (IntegerContraction, TableExpansion):
        for node, own in lowered.nodes(kind):
            name = str(node.target)
            twin: Any = module.twin(name)
            now = twin.quantized(own)
            if now is not own:
                changed[name] = now
    if not changed:
        return lowered
    line = f"quantization-aware training: {module.training_choices}, {int(module.steps)} steps"
    program = lowered.replace_modules(changed, [line])
    check(program)
    return program
