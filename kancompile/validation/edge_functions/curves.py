"""Evaluate single edge functions: what an input of a layer contributes to one of its outputs, in float and as compiled.

    f[o, i](x) = sum over k of W[o, i, k] * basis_k(x)

Three curves: the float function; the same weights on the lookup table's rounded values (a staircase); and the integers of
the file, rounded weights included. A constant of an edge is part of the layer's bias, which is corrected for all edges
together, so the compiled curves are moved to agree with the float one on average over the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import AnyExpansion, Expansion, Program, Values
from kancompile.validation.edge_functions.observation import Observation, observe
from kancompile.validation.error_measures import decibel
from kancompile.validation.layer_pairs import BranchColumns, LayerPair

POINTS = 321
BINS = 32
_ROWS = 512
_MARGIN = 0.06


@dataclass(frozen=True)
class EdgeName:
    """Which edge: layer, float expansion, output, input, and the tap of a kernel (0 in a linear layer)."""

    layer: str
    expansion: str
    output: int
    input: int
    tap: int = 0


@dataclass(frozen=True, repr=False)
class Edge:
    """One edge function.

    Attributes:
        name: which.
        importance: standard deviation of its values over the calibration inputs, over that of the largest of its layer.
        x: ``[p]`` points over the inputs seen.
        exact: float function.
        table: float weights on table values; ``None`` where the layer has no table, or a pass changed its functions.
        compiled: as in the file.
        sqnr_db: of its values over the calibration inputs, mean error apart.
        bins, counts: histogram of the calibration inputs: ``[BINS + 1]`` ends and ``[BINS]`` counts.
        rows: rows of the table that lie within the inputs seen; ``None`` without a table.
    """

    name: EdgeName
    importance: float
    x: Tensor
    exact: Tensor
    table: Tensor | None
    compiled: Tensor
    sqnr_db: float
    bins: Tensor
    counts: Tensor
    rows: int | None

    def __repr__(self) -> str:
        name = self.name
        return f"Edge of {name.layer!r}: input {name.input} to output {name.output}, {self.sqnr_db:.1f} dB"


def parse_edge(text: str, pairs: Sequence[LayerPair]) -> EdgeName:
    """Read ``LAYER:OUTPUT,INPUT`` or ``LAYER:OUTPUT,INPUT,TAP``; a layer is named, or numbered from 0.

    Raises:
        KanCompileError: another form, no such layer, or a number out of range.
    """
    layer, colon, numbers = text.rpartition(":")
    parts = numbers.split(",")
    if not colon or len(parts) not in (2, 3) or not all(part.strip().isdecimal() for part in parts):
        raise KanCompileError(f"edge {text!r}: expected LAYER:OUTPUT,INPUT such as layers.0:3,17 or 0:3,17")
    output, input, *tap = map(int, parts)
    return named_edge(pairs, layer, output, input, tap[0] if tap else None, f"edge {text!r}")


def named_edge(
    pairs: Sequence[LayerPair],
    layer: str | int,
    output: int,
    input: int,
    tap: int | None = None,
    who: str = "edge",
) -> EdgeName:
    """Find an edge by its numbers.

    Args:
        pairs: the layers.
        layer: its name, or its number from 0.
        output, input: numbers from 0, of channels in a convolution.
        tap: place in the kernel of a convolution; ``None`` for the one with the largest weights.
        who: asks, for messages.

    Raises:
        KanCompileError: no such layer, or a number out of range.
    """
    by_name = {pair.name: pair for pair in pairs}
    if layer not in by_name and str(layer).isdecimal() and int(layer) < len(pairs):
        layer = pairs[int(layer)].name
    if layer not in by_name:
        raise KanCompileError(f"{who}: no layer {layer!r}, expected one of {list(by_name)!r} or its number")
    pair = by_name[str(layer)]
    found = pair.float_branches[0]
    groups, n_out, n_in, _, taps = found.weight.shape
    for what, number, limit in (
        ("output", output, groups * n_out),
        ("input", input, groups * n_in),
        ("tap", tap or 0, taps),
    ):
        if not 0 <= number < limit:
            raise KanCompileError(f"{who}: {what} is {number}, expected 0 ... {limit - 1} in layer {layer!r}")
    if output // n_out != input // n_in:
        raise KanCompileError(f"{who}: output {output} does not read input {input}: they are in different groups")
    if tap is None and taps > 1:
        own = [branch for branch in pair.float_branches if branch.expansion == found.expansion]
        rows = [branch.weight[output // n_out, output % n_out, input % n_in] for branch in own]
        tap = int(torch.cat(rows).square().sum(0).argmax())
    return EdgeName(pair.name, found.expansion, output, input, tap or 0)


def edge_of(
    captured: Program,
    program: Program,
    x: Values,
    layer: str | int | None = None,
    input: int | None = None,
    output: int | None = None,
    seed: int = 0,
) -> Edge:
    """Evaluate one edge function in float and as compiled.

    Args:
        captured, program: the float program and the lowered one.
        x: calibration inputs ``[n, *input_shape]``.
        layer: its name, or its number from 0; ``None`` for the first.
        input, output: numbers from 0; ``None`` for the edge that varies most.
        seed: of the choice of inputs.

    Raises:
        KanCompileError: no such edge.
    """
    if (input is None) != (output is None):
        raise KanCompileError("edge: found an input or an output alone, expected both numbers or none")
    pairs = [LayerPair(captured, program, number) for number in range(len(captured.layers()))]
    name = named_edge(pairs, 0 if layer is None else layer, output or 0, input or 0)  # before anything is measured
    pair = next(pair for pair in pairs if pair.name == name.layer)
    seen = observe(captured, [pair], x, seed)
    if input is None:
        found = important_edges(pair, seen, 1)
        if not found:
            raise KanCompileError(f"edge: layer {pair.name!r} has no functions but the identity; name another layer")
        name = found[0]
    return evaluate_edges(pair, [name], seen)[0]


def important_edges(pair: LayerPair, seen: Observation, count: int) -> list[EdgeName]:
    """Name the edges of a layer with the largest spread, at most one for each input and, while others are left, output."""
    found: list[tuple[float, EdgeName]] = []
    for target in pair.float_layer.expansions:
        if target not in seen.inputs or not _is_curved(pair, target):
            continue
        spread = _spread(pair, target, seen)  # [n_out, n_in / g, t]
        n_out_of_group = pair.float_contraction.n_out // _groups(pair)
        top = spread.flatten().topk(min(spread.numel(), 64 * count))
        for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            output, rest = divmod(place, spread.shape[1] * spread.shape[2])
            input, tap = divmod(rest, spread.shape[2])
            input += output // n_out_of_group * spread.shape[1]
            found.append((value, EdgeName(pair.name, target, output, input, tap)))
    found.sort(key=lambda entry: -entry[0])
    return _varied([name for _, name in found], count)


def _varied(names: Sequence[EdgeName], count: int) -> list[EdgeName]:
    """Take names in order, first those that share neither input nor output with one taken, then the others."""
    chosen: list[EdgeName] = []
    for strict in (True, False):
        for name in names:
            clash = any(name.input == other.input or name.output == other.output for other in chosen)
            if len(chosen) < count and name not in chosen and not (strict and clash):
                chosen.append(name)
    return chosen


def _is_curved(pair: LayerPair, target: str) -> bool:
    module = pair.float_program.module(target)
    return isinstance(module, Expansion) and not module.is_identity


def _groups(pair: LayerPair) -> int:
    return int(pair.float_branches[0].weight.shape[0])


def _spread(pair: LayerPair, target: str, seen: Observation) -> Tensor:
    """Return the standard deviation of every edge over the calibration inputs, ``[n_out, n_in / g, t]``."""
    module = pair.float_program.node(target, Expansion)
    phi = module.evaluate_inputs(seen.inputs[target][:_ROWS]).double()
    phi = phi - phi.mean(0)
    covariance = torch.einsum("nik,nil->ikl", phi, phi) / len(phi)
    weight = torch.cat([branch.weight for branch in pair.float_branches if branch.expansion == target], 3)
    groups, _, n_in, k, _ = weight.shape
    grouped = covariance.reshape(groups, n_in, k, k)
    variance = (torch.einsum("goikt,gikl->goilt", weight, grouped) * weight).sum(3)
    return variance.clamp(min=0).sqrt().flatten(0, 1)


def evaluate_edges(pair: LayerPair, names: Sequence[EdgeName], seen: Observation) -> list[Edge]:
    """Evaluate the curves of some edges of one layer; one evaluation of an expansion serves all of its edges."""
    edges = []
    for target in dict.fromkeys(name.expansion for name in names):
        inputs = seen.inputs[target]
        low, high = inputs.amin(0), inputs.amax(0)
        margin = ((high - low) * _MARGIN).clamp(min=1e-6)
        steps = torch.linspace(0, 1, POINTS)[:, None]
        points = (low - margin) + steps * (high - low + 2 * margin)
        curves = _Curves(pair, target, points)
        at_inputs = _Curves(pair, target, inputs[:_ROWS])
        largest = float(_spread(pair, target, seen).max())
        edges += [
            _edge(pair, name, points[:, name.input], curves, at_inputs, inputs[:, name.input], largest)
            for name in names
            if name.expansion == target
        ]
    return edges


class _Curves:
    """The functions of one float expansion, and of the lowered ones that came from it, at points of every input."""

    def __init__(self, pair: LayerPair, target: str, points: Tensor) -> None:
        module = pair.float_program.node(target, Expansion)
        self.pair, self.target = pair, target
        self.points, self.exact = points, module.evaluate_inputs(points).double()
        lowered = [name for name in pair.layer.expansions if pair.origin(name) == target]
        self.apart = all(pair.program.node(name, AnyExpansion).is_of_each for name in lowered)
        self.lowered = {name: pair.evaluate(name, points).double() for name in lowered}

    def float_curve(self, name: EdgeName) -> Tensor:
        return sum_of(self.pair.float_branches, {self.target: self.exact}, name)

    def compiled_curve(self, name: EdgeName) -> Tensor:
        if self.apart:
            return sum_of(self.pair.branches, self.lowered, name)
        # columns belong to several inputs: let this one alone vary
        points = torch.zeros_like(self.points)
        points[:, name.input] = self.points[:, name.input]
        codes = {target: self.pair.evaluate(target, points).double() for target in self.lowered}
        own = [branch for branch in self.pair.branches if branch.expansion in codes]
        parts = [codes[b.expansion][..., b.columns].flatten(1) @ b.weight[0, name.output].flatten() for b in own]
        return torch.stack(parts).sum(0)

    def table_curve(self, name: EdgeName) -> Tensor | None:
        """Float weights on table values; ``None`` where branches have not the same functions any more."""
        total = torch.zeros(len(self.exact), dtype=torch.float64)
        for branch in self.pair.float_branches:
            if branch.expansion != self.target:
                continue
            twin = next((b for b in self.pair.branches if b.name == branch.name and b.expansion in self.lowered), None)
            table = None if twin is None else self.pair.program.node(twin.expansion, AnyExpansion)
            if (
                twin is None
                or table is None
                or not table.yields_codes
                or twin.weight.shape[3] != branch.weight.shape[3]
            ):
                return None
            codes = self.lowered[twin.expansion][:, name.input, twin.columns]
            scale = table.column_scale()[name.input, twin.columns].double()
            offset = table.column_offset()[name.input, twin.columns].double()
            total += (codes * scale + offset) @ _weights_of(branch, name)
        return total


def sum_of(branches: Sequence[BranchColumns], values: dict[str, Tensor], name: EdgeName) -> Tensor:
    """Return the function of one edge from the functions ``[n, n_in, k]`` of its expansions, float64 ``[n]``."""
    found = [b for b in branches if b.expansion in values]
    parts = [values[b.expansion][:, name.input, b.columns] @ _weights_of(b, name) for b in found]
    return torch.stack(parts).sum(0)


def _weights_of(branch: BranchColumns, name: EdgeName) -> Tensor:
    _, n_out, n_in, _, _ = branch.weight.shape
    return branch.weight[name.output // n_out, name.output % n_out, name.input % n_in, :, name.tap]


def _edge(
    pair: LayerPair, name: EdgeName, x: Tensor, curves: _Curves, at_inputs: _Curves, inputs: Tensor, largest: float
) -> Edge:
    exact, compiled = at_inputs.float_curve(name), at_inputs.compiled_curve(name)
    shift = (exact - compiled).mean()
    noise = (exact - compiled - shift).square().sum()
    table, table_at = curves.table_curve(name), at_inputs.table_curve(name)
    if table is not None and table_at is not None:
        table = table + (exact - table_at).mean()
    ends = torch.linspace(float(inputs.min()), float(inputs.max()) + 1e-9, BINS + 1)
    counts = torch.histc(inputs, BINS, float(ends[0]), float(ends[-1])) if float(ends[-1]) > float(ends[0]) else None
    spread = (exact - exact.mean()).square()
    return Edge(
        name,
        float(spread.mean().sqrt()) / max(largest, 1e-30),
        x,
        curves.float_curve(name),
        table,
        curves.compiled_curve(name) + shift,
        decibel(float(spread.sum()), float(noise)),
        ends,
        torch.zeros(BINS) if counts is None else counts,
        _rows_within(pair, name, float(x[0]), float(x[-1])),
    )


def _rows_within(pair: LayerPair, name: EdgeName, low: float, high: float) -> int | None:
    rows = [
        int(((table.index.rows() >= low) & (table.index.rows() <= high)).sum())
        for target, table in pair.program.tables(pair.layer).items()
        if pair.origin(target) == name.expansion
    ]
    return max(rows) if rows else None
