"""Evaluate one lowered layer on the inputs of its float twin, and find the columns of every branch in both.

Shapes: ``b`` batch, ``*`` leading dimensions that a layer treats alike (tokens, pixels), ``n_in`` inputs, ``k`` functions of one
input, ``g`` channel groups, ``t`` taps of a kernel (1 in a linear layer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    Contraction,
    ConvContraction,
    Expansion,
    Layer,
    PolynomialExpansion,
    Program,
    QuantizedContraction,
    QuantizedConvContraction,
    TableExpansion,
    regroup,
    to_channels_last,
)

AnyExpansion = Expansion | PolynomialExpansion | TableExpansion
AnyContraction = Contraction | ConvContraction | QuantizedContraction | QuantizedConvContraction


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
        unit: real output units for one unit of the lowered contraction's own real output; below 1 where the layer hands over
            values in rows of the next table.
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
        self.offset, self.unit = _real_units(program, self.layer)
        self.anchors = {target: _anchor(program, target) for target in self.layer.expansions}
        self.float_branches = branch_columns(float_program, self.float_layer, 1.0)
        self.branches = branch_columns(program, self.layer, self.unit)
        self._expansions = {target: _reading_real(program.module(target)) for target in self.layer.expansions}
        contraction = program.module(self.layer.contraction)
        self._as_shipped, self._unrounded = contraction, contraction
        if isinstance(contraction, QuantizedContraction):
            self._as_shipped = self._unrounded = contraction.with_output(None)
        elif isinstance(contraction, QuantizedConvContraction):
            self._as_shipped = contraction.with_output(contraction.output, "real")
            self._unrounded = contraction.with_output(None, "real")

    @property
    def float_contraction(self) -> AnyContraction:
        """Return the float contraction."""
        return _contraction(self.float_program, self.float_layer)

    @property
    def contraction(self) -> AnyContraction:
        """Return the lowered contraction."""
        return _contraction(self.program, self.layer)

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

    def features(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Evaluate the lowered expansions on real inputs, given by the name of the node that yields them."""
        return [self._expansions[target](values[self.anchors[target]]) for target in self.layer.expansions]

    def output(self, features: Sequence[Tensor]) -> Tensor:
        """Contract as the file does, in real units; the quantizer of the next table is that table's own error."""
        y: Tensor = self._as_shipped(*features)
        return (y - self.offset) * self.unit if self.unit != 1.0 or self.offset else y

    def part(self, features: Sequence[Tensor], branch: str) -> Tensor:
        """Contract the columns of one branch alone, in real units, up to a constant for every output."""
        contraction = self.contraction
        # the code that stands for 0: what padding is filled with
        neutral = contraction.zero_point if isinstance(contraction, ConvContraction | QuantizedConvContraction) else 0
        masked = [
            _only(feature, self.branches, target, branch, neutral)
            for target, feature in zip(self.layer.expansions, features, strict=True)
        ]
        y: Tensor = self._unrounded(*masked)
        return y * self.unit

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
        module = self.program.module(target)
        assert isinstance(module, AnyExpansion)
        return evaluate_inputs(module, points)


def evaluate_inputs(module: AnyExpansion, points: Tensor) -> Tensor:
    """Evaluate an expansion of any form at points ``[n, n_in]`` of its own for every input, ``[n, n_in, k]``."""
    if isinstance(module, Expansion):
        return module.evaluate_inputs(points)
    if isinstance(module, TableExpansion):
        reading = _reading_real(module)
        assert isinstance(reading, TableExpansion)
        return torch.ops.kancompile.expand(reading._quantize(points.float()), module.table, module.first_row)  # type: ignore[no-any-return]
    # points are dealt out over the leading dimensions, so that they cost no more than a few samples
    lead = math.prod(module.in_shape[:-1])
    padded = nn.functional.pad(points.float(), (0, 0, 0, -len(points) % lead)).reshape(-1, *module.in_shape)
    x = padded.movedim(-1, 1).contiguous() if module.channels_first else padded
    y: Tensor = module(x)
    return y.reshape(-1, module.n_in, module.k)[: len(points)]


def inputs_last(module: AnyExpansion, x: Tensor) -> Tensor:
    """View what an expansion reads, ``[b, ...]``, as ``[b, *, n_in]``."""
    return to_channels_last(x) if module.channels_first else regroup(x, module.in_shape)


def branch_sizes(module: AnyExpansion) -> list[tuple[str, int]]:
    """List the branches of an expansion and how many functions of an input each has."""
    if isinstance(module, Expansion):
        return [(str(branch.name), int(branch.k)) for branch in module.branches]  # type: ignore[arg-type]
    return list(zip(module.branch_names, module.branch_sizes, strict=True))


def branch_columns(program: Program, layer: Layer, unit: float) -> list[BranchColumns]:
    """Find the columns of every branch of a layer, with their weights in real units."""
    contraction = _contraction(program, layer)
    weight, groups = _real_weight(contraction)
    found = []
    start = 0
    for target in layer.expansions:
        module = program.module(target)
        assert isinstance(module, AnyExpansion)
        size = module.n_in // groups * module.k
        part = weight[:, start : start + size].reshape(groups, -1, module.n_in // groups, module.k, weight.shape[-1])
        start += size
        first = 0
        for name, k in branch_sizes(module):
            columns = slice(first, first + k)
            found.append(BranchColumns(name, target, columns, part[..., columns, :] * unit))
            first += k
    return found


def _real_weight(contraction: AnyContraction) -> tuple[Tensor, int]:
    """Return weights as float64 ``[n_out, columns of a group, t]``, and the groups."""
    if isinstance(contraction, QuantizedContraction):
        parts = [
            codes.double().T * scale.double()[:, None]
            for codes, scale in zip(contraction.weights, contraction.scales, strict=True)
        ]
        return torch.cat(parts, 1)[..., None], 1
    if isinstance(contraction, QuantizedConvContraction):
        scaled = contraction.weight.double().flatten(2) * contraction.scale.double()[:, None, None]
        return scaled, contraction.geometry.groups
    if isinstance(contraction, ConvContraction):
        return contraction.weight.double().flatten(2), contraction.geometry.groups
    return contraction.weight.double()[..., None], 1


def _real_units(program: Program, layer: Layer) -> tuple[float, float]:
    """Return offset and unit of what a layer hands over: ``real = (y - offset) * unit``."""
    if not isinstance(program.module(layer.contraction), QuantizedContraction):
        return 0.0, 1.0
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module" and any(str(source.target) == layer.contraction for source in node.all_input_nodes):
            table = program.module(node.target)
            if isinstance(table, TableExpansion) and table.input == "scaled":
                multiplier, offset = table.index.to_rows()
                return offset, 1.0 / multiplier
    return 0.0, 1.0


def _anchor(program: Program, target: str) -> str:
    node = next(node for node in program.graph_module.graph.nodes if node.target == target)
    return str(node.all_input_nodes[0].name)


def _reading_real(module: nn.Module) -> nn.Module:
    return module.reading_real() if isinstance(module, TableExpansion) else module


def _contraction(program: Program, layer: Layer) -> AnyContraction:
    module = program.module(layer.contraction)
    assert isinstance(module, AnyContraction)
    return module


def _only(feature: Tensor, branches: Sequence[BranchColumns], target: str, branch: str, neutral: int) -> Tensor:
    kept = torch.full_like(feature, neutral)
    for columns in branches:
        if columns.expansion == target and columns.name == branch:
            kept[..., columns.columns] = feature[..., columns.columns]
    return kept
