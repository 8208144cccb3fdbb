"""Divide the error of one lowered layer into its causes: range, levels, codes and weights.

With float functions ``phi``, looked-up ones ``phi'`` (table code times scale plus offset) and the contraction's linear map
``A``, the error at the layer's output is, on float inputs of the layer,

    A'(phi') - A(phi) = A(outside (phi' - phi)) + A(inside (phi' - phi)) + (A' - A)(phi')

The first part is what the table's range cuts off, the second the number of its rows and its 8-bit codes, the third the
rounding of weights. Codes alone cost ``A^2 scale^2 / 12``, uniform rounding noise. Each is a mean of squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kancompile.diagnosis.laboratory import Laboratory
from kancompile.ir import (
    Contraction,
    Expansion,
    IndexQuantizer,
    IntegerContraction,
    JointTable,
    Layer,
    Program,
    TableExpansion,
    Values,
)
from kancompile.passes import cost_of_pairs
from kancompile.recipe import SettledRecipe
from kancompile.validation import branch_columns, dead_columns

PARTS = ("outside", "levels", "codes", "weights")
_SAMPLES = 256
_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Anatomy:
    """One lowered layer.

    Attributes:
        layer: its name.
        outside, levels, codes, weights: mean squared error at its output from each part, in squared output units.
        outside_share: share of its inputs outside of the table.
        outside_judged: the same on the samples that judge.
        low, high: inputs of the first and the last row; of several tables the one that cuts off most.
        input_low, input_high: extremes of the inputs that reach it in calibration.
        rows: rows of its largest table.
        weight_bits: bits of its weights as they were rounded.
        pair_cost: by how much the error of the weights grew so that sums of two products fit int16.
        reads: what its table reads when all layers are lowered.
        columns, dead_columns: weight columns, and those that contribute nothing (``validation.dead_columns``).
        is_convolution: whether its contraction is one.
        is_joint: whether it looks inputs up in pairs; ``levels`` then is all of its error.
    """

    layer: str
    outside: float
    levels: float
    codes: float
    weights: float
    outside_share: float
    outside_judged: float
    low: float
    high: float
    input_low: float
    input_high: float
    rows: int
    weight_bits: int
    pair_cost: float
    reads: str
    columns: int
    dead_columns: int
    is_convolution: bool
    is_joint: bool = False

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.outside + self.levels + self.codes + self.weights

    @property
    def most_rows(self) -> int:
        """Rows up to which finer tables are worth a try."""
        return 256 if self.is_convolution else 4096

    def share(self, part: str) -> float:
        """Share of one part in the sum, 0 where there is no error."""
        return float(getattr(self, part)) / self.total if self.total > 0 else 0.0

    def scaled(self, factors: Mapping[str, float]) -> float:
        """Predict which share of the layer's error is left when parts change by factors."""
        left = sum(float(getattr(self, part)) * factors.get(part, 1.0) for part in PARTS)
        return left / self.total if self.total > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def dissect(laboratory: Laboratory, recipe: SettledRecipe, name: str) -> Anatomy:
    """Lower one layer alone and divide its error.

    Args:
        laboratory: what lowers and holds the samples.
        recipe: with the layer as an integer layer.
        name: of the layer.
    """
    key = {"fact": "anatomy", "recipe": recipe.whole.canonical_json(), "layer": name}
    known = None if laboratory.memory is None else laboratory.memory.get(key, Anatomy)
    if known is not None:
        return known
    found = _dissect(laboratory, recipe, name)
    if laboratory.memory is not None:
        laboratory.memory.put(key, found)
    return found


def _dissect(laboratory: Laboratory, recipe: SettledRecipe, name: str) -> Anatomy:
    alone = laboratory.alone(recipe, name)
    lowered, exact = laboratory.lowered(alone), laboratory.functions(alone)
    layer, low_layer = exact.layer(name), lowered.layer(name)
    contraction = exact.node(layer.contraction, Contraction)
    x = _few(exact, layer, laboratory.x)
    if isinstance(lowered.module(low_layer.expansions[0]), JointTable):
        return _with_ranges(laboratory, _of_pairs(laboratory, recipe, exact, lowered, name, x), exact, lowered)
    floats = exact.trace(x, [*layer.expansions, layer.contraction])
    integers = lowered.trace(x, [*low_layer.expansions, low_layer.contraction])
    looked_up, cut, dead, coded = [], [], 0, []
    branches = branch_columns(lowered, low_layer)
    for target, table_target in zip(layer.expansions, low_layer.expansions, strict=True):
        table = lowered.node(table_target, TableExpansion)
        phi = floats[target][1]
        real = (integers[table_target][1].float() * table.column_scale() + table.column_offset()).reshape(phi.shape)
        inside = _inside(table, floats[target][0][0]).reshape(*phi.shape[:-1], 1)
        looked_up.append(real)
        cut.append((real - phi) * ~inside)
        seen = integers[table_target][1].reshape(-1, *phi.shape[-2:])
        low, high = seen.amin(0), seen.amax(0)
        dead += sum(dead_columns(branch, low, high).either for branch in branches if branch.expansion == table_target)
        coded.append((table.column_scale() / 12**0.5).expand_as(phi[:1]))

    def mapped(features: list[Tensor]) -> Tensor:
        with torch.no_grad():
            output: Tensor = contraction.with_weight(contraction.weight, torch.zeros_like(contraction.bias))(*features)
            return output

    phis = [floats[target][1] for target in layer.expansions]
    outside = float(mapped(cut).double().square().mean())
    rows_and_codes = [real - phi - lost for real, phi, lost in zip(looked_up, phis, cut, strict=True)]
    inside_error = float(mapped(rows_and_codes).double().square().mean())
    with torch.no_grad():
        # the map of variances of independent features
        squared = contraction.with_weight(contraction.weight.square(), torch.zeros_like(contraction.bias))
        codes = float(squared(*[value.square() for value in coded]).double().mean())
    with torch.no_grad():
        rounded_apart = contraction(*looked_up)
    difference = (integers[low_layer.contraction][1].reshape(rounded_apart.shape) - rounded_apart).double()
    difference = contraction.by_output(difference)
    # the bias of the lowered layer takes the mean error up
    weights = float((difference - difference.mean(0)).square().mean())
    codes = min(codes, inside_error)
    return _with_ranges(
        laboratory,
        Anatomy(
            layer=name,
            outside=outside,
            levels=inside_error - codes,
            codes=codes,
            weights=weights,
            outside_share=0.0,
            outside_judged=0.0,
            low=0.0,
            high=0.0,
            input_low=0.0,
            input_high=0.0,
            rows=0,
            weight_bits=lowered.node(low_layer.contraction, IntegerContraction).weight_bits,
            pair_cost=cost_of_pairs(lowered.notes, name),
            reads=_reads(laboratory, recipe, name),
            columns=sum(phi.shape[-2] * phi.shape[-1] for phi in phis),
            dead_columns=dead,
            is_convolution=contraction.geometry is not None,
        ),
        exact,
        lowered,
    )


def _of_pairs(
    laboratory: Laboratory, recipe: SettledRecipe, exact: Program, lowered: Program, name: str, x: Values
) -> Anatomy:
    """Measure a layer whose columns belong to pairs of inputs, so that no column of the float layer has its like."""
    found = [program.trace(x, [program.layer(name).contraction]) for program in (exact, lowered)]
    expected, got = (next(iter(traced.values()))[1] for traced in found)
    contraction = lowered.node(lowered.layer(name).contraction, IntegerContraction)
    error = float((got.reshape(expected.shape) - expected).double().square().mean())
    return Anatomy(
        layer=name,
        outside=0.0,
        levels=error,
        codes=0.0,
        weights=0.0,
        outside_share=0.0,
        outside_judged=0.0,
        low=0.0,
        high=0.0,
        input_low=0.0,
        input_high=0.0,
        rows=0,
        weight_bits=contraction.weight_bits,
        pair_cost=1.0,
        reads=_reads(laboratory, recipe, name),
        columns=contraction.matrix.shape[1],
        dead_columns=0,
        is_convolution=False,
        is_joint=True,
    )


def _with_ranges(laboratory: Laboratory, anatomy: Anatomy, exact: Program, lowered: Program) -> Anatomy:
    """Count the inputs outside of the tables on all samples."""
    layer, low_layer = exact.layer(anatomy.layer), lowered.layer(anatomy.layer)
    read = exact.inputs(laboratory.x, layer.expansions)
    judged = exact.inputs(laboratory.judging.samples, layer.expansions)
    worst = anatomy
    for target, table_target in zip(layer.expansions, low_layer.expansions, strict=True):
        table = lowered.node(table_target, TableExpansion)
        share = float((~_inside(table, read[target])).double().mean())
        index = table.index
        if worst.rows == 0 or share > worst.outside_share:
            worst = replace(
                worst,
                outside_share=share,
                outside_judged=float((~_inside(table, judged[target])).double().mean()),
                low=index.low,
                high=index.high,
                input_low=float(read[target].min()),
                input_high=float(read[target].max()),
            )
        worst = replace(worst, rows=max(worst.rows, index.levels))
    return worst


def as_prepared(laboratory: Laboratory, name: str) -> list[Expansion]:
    """List the float expansions of a layer."""
    modules = laboratory.program.expansions(laboratory.program.layer(name))
    return [module for module in modules if isinstance(module, Expansion)]


def _few(program: Program, layer: Layer, x: Values) -> Values:
    """Choose as many samples as fit the memory that basis values may take."""
    columns = sum(program.trace(x[:1], layer.expansions)[target][1].numel() for target in layer.expansions)
    wanted = max(16, min(_SAMPLES, _ELEMENTS // max(columns, 1)))
    return x[:: max(1, len(x) // wanted)][:wanted]


def _inside(table: TableExpansion, x: Tensor) -> Tensor:
    """Say for every input, bool ``[b, *, n_in]``, whether it lies within half a row of the table."""
    return table.inputs_last(within(table.index, x, table.index.scale / 2))


def within(index: IndexQuantizer, x: Tensor, margin: float) -> Tensor:
    """Say for every input whether a table's rows reach it."""
    slack = margin + 1e-6 * (index.high - index.low)
    return (x >= index.low - slack) & (x <= index.high + slack)


def _reads(laboratory: Laboratory, recipe: SettledRecipe, name: str) -> str:
    """Say what the layer's first table reads in the program with all layers lowered."""
    program = laboratory.lowered(recipe)
    tables = program.tables(program.layer(name))
    return next(iter(tables.values())).input if tables else "real"
