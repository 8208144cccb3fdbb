"""Sensitivity sweeps: what the output loses through one layer or one branch alone, and what it regains without it.

*Only one*: a layer (or one branch of it) is lowered, everything else stays in float. *All but one*: the reverse. Where errors
add up like independent noise, the two say the same; where they do not, both are worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kancompile.diagnosis.laboratory import Laboratory, Outcome
from kancompile.ir import (
    Contraction,
    IntegerContraction,
    JointTable,
    Layer,
    Program,
    TableExpansion,
    Values,
    layer_tables,
)
from kancompile.passes import SplitBranches
from kancompile.recipe import SettledRecipe
from kancompile.validation import plain_number

_CENTRED = 256


@dataclass(frozen=True)
class Sensitivity:
    """What one layer, or one of its branches, costs at the output.

    Attributes:
        layer: its name.
        branch: name of the branch, ``None`` for the whole layer.
        only: outcome with nothing else lowered.
        without: outcome with all else lowered, ``None`` for a branch.
    """

    layer: str
    branch: str | None
    only: Outcome
    without: Outcome | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "layer": self.layer,
            "branch": self.branch,
            "only_sqnr_db": plain_number(self.only.sqnr_db),
            "only_drop": plain_number(self.only.drop),
            "without_sqnr_db": None if self.without is None else plain_number(self.without.sqnr_db),
            "without_drop": None if self.without is None else plain_number(self.without.drop),
        }


def sensitivities_of(laboratory: Laboratory, recipe: SettledRecipe, name: str) -> list[Sensitivity]:
    """Measure an integer layer, and every branch where it has several and is no convolution."""
    alone = laboratory.alone(recipe, name)
    only = laboratory.outcome(alone)
    without = laboratory.outcome(recipe.with_overrides({name: {"lowering": "keep"}}))
    found = [Sensitivity(name, None, only, without)]
    branches = list(branch_programs(laboratory, laboratory.lowered(alone), name))
    if len(branches) > 1:
        for branch, program in branches:
            outcome = laboratory.judge(program)
            found.append(Sensitivity(name, branch, outcome, None))
    return found


def branch_programs(laboratory: Laboratory, lowered: Program, name: str) -> Iterator[tuple[str, Program]]:
    """Yield, for every branch of a layer, the float program with that branch's tables and weights as they were lowered.

    The integer contraction is a sum over columns, so the columns of one branch can be taken over into a float contraction,
    ``V_c = s c`` for weight codes ``c``, while the others keep their float functions and weights. The mean error of a branch
    is taken out, as the bias of the lowered layer takes it up.

    Args:
        laboratory: with the float program and calibration inputs.
        lowered: the program in which only this layer is lowered.
        name: of the layer.
    """
    split = SplitBranches(lambda other: other == name)(laboratory.program)
    layer = split.layer(name)
    contraction = split.node(layer.contraction, Contraction)
    taken = _lowered_branches(lowered, name)
    sizes = [expansion.n_in * expansion.k for expansion in split.expansions(layer)]
    if (
        contraction.geometry is not None
        or len(layer.expansions) != len(taken)
        or sizes != [weight.shape[1] for _, _, weight in taken]
    ):
        return  # a convolution, or functions that were factorized over branches: there are no branches to tell apart
    parts = contraction.weight.split(sizes, 1)
    for number, (branch, table, weight) in enumerate(taken):
        changed = [weight if other == number else part for other, part in enumerate(parts)]
        bias = contraction.bias + parts[number] @ table.column_offset().flatten()
        modules = {
            layer.expansions[number]: table,
            layer.contraction: contraction.with_weight(torch.cat(changed, 1), bias),
        }
        program = split.replace_modules(modules)
        error = _mean_error(split, program, layer, laboratory.x[:_CENTRED])
        centred = contraction.with_weight(torch.cat(changed, 1), bias - error)
        yield branch, program.replace_modules({layer.contraction: centred})


def _lowered_branches(lowered: Program, name: str) -> list[tuple[str, TableExpansion, Tensor]]:
    """Cut the tables of a lowered layer into branches: name, table and float weight of its codes ``[n_out, n_in * k]``."""
    layer = lowered.layer(name)
    contraction = lowered.contraction(layer)
    if not isinstance(contraction, IntegerContraction) or contraction.geometry is not None:
        return []
    weight = contraction.real_weight()
    found = []
    start = 0
    if any(isinstance(table, JointTable) for table in layer_tables(lowered, layer)):
        return []
    for table in layer_tables(lowered, layer):
        columns = weight[:, start : start + table.n_in * table.k].reshape(-1, table.n_in, table.k)
        start += table.n_in * table.k
        first = 0
        for size, branch in zip(table.branch_sizes, table.branch_names, strict=True):
            chosen = slice(first, first + size)
            first += size
            cut = table.replace(
                table=table.table[:, chosen].contiguous(),
                scale=table.scale[:, chosen],
                offset=table.offset[:, chosen],
                branch_sizes=[size],
                branch_names=[branch],
            )
            found.append((branch, cut, columns[..., chosen].flatten(1).contiguous()))
    return found


def _mean_error(split: Program, program: Program, layer: Layer, x: Values) -> Tensor:
    expected = split.trace(x, [layer.contraction])[layer.contraction][1]
    found = program.trace(x, [layer.contraction])[layer.contraction][1]
    return split.contraction(layer).by_output(found - expected).mean(0)
