"""Evaluate one lowered layer on the inputs of its float twin, and find the columns of every branch in both.

Shapes: ``b`` batch, ``*`` leading dimensions that a layer treats alike (tokens, pixels), ``n_in`` inputs, ``k`` functions of one
input, ``g`` channel groups, ``t`` taps of a kernel (1 in a linear layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import AnyExpansion, Layer, Program


@dataclass(frozen=True)
class BranchColumns:
    """The columns of one branch in one expansion.

    Attributes:
        name: of the branch.
        expansion: name of the expansion's module.
        columns: which of its ``k`` functions.
        weight: float64 ``[g, n_out / g, n_in / g, k, t]``, real output units for one unit of the expansion's own output
            (a code step, behind a table).
    """

    name: str
    expansion: str
    columns: slice
    weight: Tensor


class LayerPair:
    """A float layer and what it was lowered to.

    Attributes:
        name: of the layer.
        float_program, program: the captured program and the lowered one.
        float_layer, layer: the modules in each.
        float_branches, branches: the columns in each.
        contraction, float_contraction: the lowered and the float map.
    """

    def __init__(self, float_program: Program, program: Program, number: int) -> None:
        """Pair layer ``number`` of both programs.

        Raises:
            KanCompileError: the programs have not the same layers.
        """
        self.float_program, self.program = float_program, program
        self.float_layer, self.layer = float_program.layers()[number], program.layers()[number]
        if self.float_layer.name != self.layer.name:
            raise KanCompileError(
                f"layers: found {self.layer.name!r} in the lowered program, expected {self.float_layer.name!r}"
            )
        self.name = self.layer.name
        self.float_contraction = float_program.contraction(self.float_layer)
        self.contraction = program.contraction(self.layer)
        self._shipped, self._unrounded = self.contraction.handing_real(), self.contraction.unrounded()
        self.float_branches = branch_columns(float_program, self.float_layer)
        self.branches = branch_columns(program, self.layer)
        expansions = zip(self.layer.expansions, program.expansions(self.layer), strict=True)
        self._expansions = {target: expansion.reading_real() for target, expansion in expansions}

    @property
    def branch_names(self) -> list[str]:
        """Return the branches that stand in both programs, in the order of the float one."""
        lowered = {branch.name for branch in self.branches}
        return [name for name in dict.fromkeys(b.name for b in self.float_branches) if name in lowered]

    @property
    def branches_match(self) -> bool:
        """Whether all branches stand in both programs."""
        return {branch.name for branch in self.branches} == {branch.name for branch in self.float_branches}

    def origin(self, target: str) -> str:
        """Return the float expansion that a lowered one comes from; passes that divide one append to its name."""
        return self.float_layer.origin(target)

    def features(self, read: Mapping[str, Tensor]) -> list[Tensor]:
        """Evaluate the lowered expansions on what the float ones read, given by their names."""
        return [self._expansions[target](read[self.origin(target)]) for target in self.layer.expansions]

    def float_features(self, read: Mapping[str, Tensor]) -> list[Tensor]:
        """Evaluate the float expansions on what they read."""
        program = self.float_program
        return [program.node(target, AnyExpansion)(read[target]) for target in self.float_layer.expansions]

    def output(self, features: Sequence[Tensor]) -> Tensor:
        """Contract as the file does, in real units; the quantizer of the next table is that table's own error."""
        found: Tensor = self._shipped.hands_over.real(self._shipped(*features))
        return found.reshape(-1, *self.float_contraction.out_shape)

    def part(self, features: Sequence[Tensor], branch: str) -> Tensor:
        """Contract the columns of one branch alone, in real units, up to a constant for every output."""
        # the code that stands for 0: what padding is filled with
        neutral = self.contraction.zero_point
        masked = [
            _only(feature, self.branches, target, branch, neutral)
            for target, feature in zip(self.layer.expansions, features, strict=True)
        ]
        return self._unrounded.hands_over.real(self._unrounded(*masked))

    def float_part(self, features: Sequence[Tensor], branch: str) -> Tensor:
        """Contract the columns of one branch of the float layer alone, up to a constant for every output."""
        masked = [
            _only(feature, self.float_branches, target, branch, 0)
            for target, feature in zip(self.float_layer.expansions, features, strict=True)
        ]
        y: Tensor = self.float_contraction(*masked)
        return y

    def evaluate(self, target: str, points: Tensor) -> Tensor:
        """Evaluate a lowered expansion at points of every input, ``[n, n_in] -> [n, n_in, k]``, codes behind a table."""
        return self.program.node(target, AnyExpansion).evaluate_inputs(points)


def branch_columns(program: Program, layer: Layer) -> list[BranchColumns]:
    """Find the columns of every branch of a layer, with their weights in real units."""
    contraction = program.contraction(layer)
    groups, unit = contraction.groups, contraction.hands_over.unit
    weight = contraction.real_weight(torch.float64).reshape(contraction.n_out, -1, contraction.taps)
    found = []
    start = 0
    for target, module in zip(layer.expansions, program.expansions(layer), strict=True):
        size = module.n_in // groups * module.k
        part = weight[:, start : start + size].reshape(groups, -1, module.n_in // groups, module.k, weight.shape[-1])
        start += size
        first = 0
        for name, k in module.branch_functions:
            columns = slice(first, first + k)
            found.append(BranchColumns(name, target, columns, part[..., columns, :] * unit))
            first += k
    return found


def _only(feature: Tensor, branches: Sequence[BranchColumns], target: str, branch: str, neutral: int) -> Tensor:
    kept = torch.full_like(feature, neutral)
    for columns in branches:
        if columns.expansion == target and columns.name == branch:
            kept[..., columns.columns] = feature[..., columns.columns]
    return kept
