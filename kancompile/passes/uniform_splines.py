"""Write cubic B-splines on equally spaced knots as one formula, which takes fewer bytes than tables of their pieces.

    B_j(x) = max(2 a - t, 0)^3 - 4 max(a - t, 0)^3        t = a |x - c_j| / h,   a = 6^(-1/3)

with knots ``h`` apart and ``c_j`` the middle of the four cells of function ``j`` (de Boor, *A Practical Guide to Splines*, 1978,
the symmetric form of truncated powers). Knots are those at which the functions are seen to change, and the formula is compared
with the functions before it takes their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir import Branch, Expansion, Program, Values
from kancompile.passes.lower_to_polynomials import Region, find_breakpoints
from kancompile.recipe import FunctionCosts

_A = 6.0 ** (-1 / 3)
_POINTS, _MOST_KNOTS, _TOLERANCE = 1024, 256, 1e-5


class UniformSplines(nn.Module):
    """Cubic B-splines about equally spaced centers.

    Attributes:
        centers: float32 ``[k]``.
        slope: ``6^(-1/3)`` over the distance of knots.
    """

    centers: Tensor

    def __init__(self, centers: Tensor, distance: float) -> None:
        super().__init__()
        self.register_buffer("centers", centers.float())
        self.slope = float(torch.tensor(_A / distance))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, *]`` to values ``[b, *, k]``."""
        t = ((x.unsqueeze(-1) - self.centers) * self.slope).abs()
        return torch.relu(2 * _A - t) ** 3 - torch.relu(_A - t) ** 3 * 4


@dataclass(frozen=True)
class WriteUniformSplines:
    """Write B-splines of float layers so; other functions stay.

    Attributes:
        applies: says for a layer's name whether to look at it.
        costs: of operators.
    """

    applies: Callable[[str], bool]
    costs: FunctionCosts

    name = "write-uniform-splines"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program, the same one where nothing changes.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``, over whose range the formula is compared.
        """
        wanted = [layer for layer in program.layers() if self.applies(layer.name) and program.is_float(layer)]
        targets = [target for layer in wanted for target in layer.expansions]
        found: dict[str, nn.Module] = {}
        for target, read in program.inputs(x, targets).items():
            expansion = program.module(target)
            if type(expansion) is not Expansion or expansion.in_shape != expansion.anchor_shape:
                continue
            low, high = float(read.min()), float(read.max())
            known: list[Branch] = list(expansion.branches)  # type: ignore[arg-type]
            branches = self._written(expansion, known, low, high)
            if any(new is not old for new, old in zip(branches, known, strict=True)):
                found[target] = Expansion(expansion.anchor_shape, branches)
        notes = [f"{len(found)} expansion(s) of B-splines on equally spaced knots written as one formula"]
        return program.replace_modules(found, notes) if found else program

    def _written(self, expansion: Expansion, known: list[Branch], low: float, high: float) -> list[Branch]:
        if not high > low:
            return known
        margin = (high - low) / 4
        points = torch.linspace(low - margin, high + margin, _POINTS)
        shapes = expansion.anchor_shape, expansion.in_shape
        looks = [find_breakpoints(Region([branch], *shapes), points, self.costs) for branch in known]
        if any(look.risky for look in looks):  # at the edge of an operator's domain, where polynomials are safe
            return known
        return [
            branch if look.breakpoints is None else _as_formula(expansion, branch, look.breakpoints[0], points)
            for branch, look in zip(known, looks, strict=True)
        ]


def _as_formula(expansion: Expansion, branch: Branch, knots: Tensor, points: Tensor) -> Branch:
    """Give a branch as a formula, and as it is where it is not one of these splines, also far outside of the points."""
    if branch.k < 4 or not 3 <= len(knots) <= _MOST_KNOTS or isinstance(branch.region, UniformSplines):
        return branch
    far = (points[-1] - points[0]) * torch.tensor([1.0, 10.0, 1000.0])
    compared = torch.cat([points, points[0] - far, points[-1] + far])
    alone = Expansion(expansion.anchor_shape, [branch])
    expected = alone.evaluate_inputs(compared[:, None].expand(-1, alone.n_in))
    distance = float(knots.double().diff().median())
    positions = torch.arange(branch.k).double() * distance
    places = torch.arange(math.prod(expansion.in_shape) * branch.k).reshape(*expansion.in_shape, branch.k)
    largest = float(expected.abs().max())
    for step in range(-branch.k - 4, len(knots) + 4):
        region = UniformSplines(float(knots[0]) + step * distance + positions, distance)
        error = (region(compared)[:, None] - expected).abs().max()
        if float(error) <= _TOLERANCE * largest:
            return Branch(branch.name, region, places)
    return branch


def layers_with_splines(program: Program) -> set[str]:
    """Name the layers that have splines as a formula: their other functions cost little, and stay."""
    return {
        layer.name
        for layer in program.layers()
        for expansion in program.expansions(layer)
        if any(isinstance(module, UniformSplines) for module in expansion.modules())
    }
