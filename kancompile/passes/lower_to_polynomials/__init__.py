"""Replace float expansions by piecewise polynomials, so that a float file computes KAN layers fast.

    phi = expand(x)        ->        row, t = cell(x); phi = sum_j coefficient_j[row] * t^j

It is decided for each branch. A branch *stays* as PyTorch computes it where that costs less, in time and bytes
(a SiLU by itself), and becomes a polynomial otherwise; a branch that comes near the edge of an operator's domain, such as
``acos(tanh(x))``, always becomes one, because the runtime's tanh may exceed 1. All polynomials of an expansion share
one table. Where some branches stay and others do not, the expansion is split and the weight columns follow::

    y = W [phi_1 | phi_2]        ->        y = W_2 phi_2 + W_1 phi_1

A tolerance holds for the functions of one layer. Steep layers behind it (narrow knots, symbolic squares) amplify its error, so a
float lowering compares the output on calibration inputs and lowers the tolerance where that is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    AnyExpansion,
    Branch,
    Contraction,
    Expansion,
    Layer,
    PolynomialExpansion,
    Program,
    Values,
    joined,
)
from kancompile.passes.lower_to_polynomials.breakpoints import find_breakpoints, merge
from kancompile.passes.lower_to_polynomials.form_cost import Beside
from kancompile.passes.lower_to_polynomials.observed_region import ObserveRegion, Region
from kancompile.passes.lower_to_polynomials.piecewise_fit import Lowered, lower
from kancompile.passes.lower_to_polynomials.region_functions import CannotFit, describe_functions
from kancompile.recipe import DEFAULT_PROFILE, FunctionCosts, package_profile

_LEAST_BYTES = 1 << 19
_SHARED_BYTES = 1 << 20  # a table that all inputs use should stay in a second-level cache
_CHUNK = 128
_GAIN = 0.8  # share of the cost below which a polynomial is worth its error
_LEFT = " left as PyTorch computes it"
TOLERANCES = (1e-6, 1.5e-7)
"""Relative errors of functions to try; float32 rounding is 6e-8."""
OUTPUT_ERROR = 5e-6
_COMPARED = 256


@dataclass(frozen=True)
class LowerToPolynomials:
    """Lower the expansions of every layer; what is a polynomial already stays.

    Attributes:
        tolerance: error allowed of a function, relative to the larger of its value and the largest value that it takes
            on the calibration inputs and between its breakpoints. Float32 rounding adds as much again.
        degrees: degrees to choose from by time and bytes; ``(1,)`` gives interpolated tables, which are fastest.
        most_bytes: how large the coefficients of one expansion may be; ``None``: as large as the weights that read it
            and at least 512 KiB, and for a table that all inputs share at most 1 MiB.
        applies: says for a layer's name whether to lower it; ``None``: all layers.
        costs: of operators, by which the fastest form is chosen.
    """

    tolerance: float = 1e-6
    degrees: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    most_bytes: int | None = None
    applies: Callable[[str], bool] | None = None
    costs: FunctionCosts = field(default_factory=lambda: package_profile(DEFAULT_PROFILE).functions)

    name = "lower-to-polynomials"

    def __post_init__(self) -> None:
        """Check the options."""
        if not 1e-7 <= self.tolerance < 1:
            raise KanCompileError(
                f"pass {self.name!r}: found tolerance {self.tolerance!r}, expected at least 1e-07 (float32) and below 1"
            )
        if not self.degrees or not all(1 <= degree <= 7 for degree in self.degrees):
            raise KanCompileError(f"pass {self.name!r}: found degrees {self.degrees!r}, expected some of 1 ... 7")

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the lowered program, or the same one where nothing changes.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``; they set the scale of errors, the result holds for all inputs.

        Raises:
            KanCompileError: the program is an integer program, or an expansion can neither be lowered nor stay.
        """
        layers = [layer for layer in program.layers() if self.applies is None or self.applies(layer.name)]
        for layer in layers:
            if not program.is_float(layer):
                raise KanCompileError(
                    f"layer {layer.name!r}: found integer weights, expected a float contraction; "
                    f"run {self.name!r} on the captured program, instead of tabulation"
                )
        readers = _readers(program, layers)
        ranges = _ranges(program, x, readers)
        notes: list[str] = []
        for target, reading in readers.items():
            expansion = program.node(target, Expansion)
            plan, note = self._plan(expansion, *ranges[target], reading[0].name, _weights(program, target, reading))
            if plan is not None:
                program = _apply(program, target, expansion, plan)
            if plan is not None or not _said(program.notes, note):
                notes.append(note)
        return replace(program, notes=(*program.notes, *notes)) if notes else program

    def _plan(
        self, expansion: Expansion, low: float, high: float, layer: str, weights: int
    ) -> tuple[_Plan | None, str]:
        """Decide which branches become polynomials; ``None`` where all stay. The note says what and why."""
        branches: list[Branch] = list(expansion.branches)  # type: ignore[arg-type]
        who = f"layer {layer!r}: "
        points = _points(low, high)
        looks = [find_breakpoints(_region(expansion, [branch]), points, self.costs) for branch in branches]
        unsafe = [number for number, look in enumerate(looks) if look.risky]
        stay = [look.nanoseconds for look in looks]
        best, least = None, _GAIN * Beside(weights, sum(stay)).cost() if not unsafe else float("inf")
        reasons: list[str] = []
        every = list(range(len(branches)))
        for chosen in _subsets(every, unsafe, stay):
            rest = sum(stay[number] for number in every if number not in chosen)
            if len(chosen) < len(every):
                rest += self.costs.apart * sum(branches[number].k for number in every)
            try:
                region = _region(expansion, [branches[number] for number in chosen])
                breakpoints = _together([looks[number].breakpoints for number in chosen])
                functions = describe_functions(region, breakpoints, low, high, self.tolerance)
                size = self._most_bytes(functions.count, weights)
                names = [(branches[number].name, branches[number].k) for number in chosen]
                lowered = lower(functions, names, size, self.degrees, self.costs, Beside(weights, rest))
            except CannotFit as reason:
                reasons.append(f"{_names(branches, chosen)}: {reason}")
                continue
            if lowered.cost < least:
                best, least = _Plan(tuple(chosen), lowered), lowered.cost
        why = "; ".join(reasons)
        if unsafe and best is None:
            risky = sorted(set().union(*(looks[number].risky for number in unsafe)))
            raise KanCompileError(
                f"{who}branch {_names(branches, unsafe)} runs {', '.join(risky)} at the edge of its domain, where another "
                f"runtime may return NaN, and has no polynomial form: {why}; keep its input away from the edge, with clamp"
            )
        if best is None:
            cheap = f"cheaper than polynomials ({sum(stay):.0f} ns for each input)"
            return None, f"{who}{_names(branches, every)}{_LEFT}: {why or cheap}"
        kept = [number for number in every if number not in best.chosen]
        facts = best.lowered.module.describe()
        note = (
            f"{who}{_names(branches, best.chosen)} in {facts['rows']} {facts['cells']} cells of degree {facts['degree']}, "
            f"{facts['tables']} distinct, {facts['table_bytes']} bytes, relative error {best.lowered.error:.2g}"
        )
        return best, note + (f"; {_names(branches, kept)}{_LEFT}" if kept else "")

    def _most_bytes(self, tables: int, weights: int) -> int:
        if self.most_bytes is not None:
            return self.most_bytes
        size = max(weights, _LEAST_BYTES)
        return min(size, _SHARED_BYTES) if tables == 1 else size


def _said(notes: Iterable[str], note: str) -> bool:
    """Tell whether an earlier run already reported that these branches of this layer stay."""
    start, _, _ = note.partition(_LEFT)
    layer, _, names = start.partition(": ")
    return any(old.startswith(f"{layer}: ") and f"{names}{_LEFT}" in old for old in notes)


@dataclass(frozen=True)
class _Plan:
    """Which branches become one polynomial expansion."""

    chosen: tuple[int, ...]
    lowered: Lowered


def _subsets(every: list[int], unsafe: list[int], stay: Sequence[float]) -> list[list[int]]:
    """List which branches to try as polynomials: all, those that are not the cheapest to keep, and those that must."""
    ordered = sorted(every, key=lambda number: (number not in unsafe, -stay[number]))
    found = [sorted(ordered[:count]) for count in range(len(every), 0, -1)]
    return [chosen for chosen in found if set(unsafe) <= set(chosen)]


def _names(branches: Sequence[Branch], chosen: Iterable[int]) -> str:
    return " and ".join(repr(branches[number].name) for number in chosen)


def _region(expansion: Expansion, branches: Sequence[Branch]) -> Region:
    return Region(tuple(branches), expansion.anchor_shape, expansion.in_shape, expansion.channels_first)


def _together(found: Sequence[list[Tensor] | None]) -> list[Tensor]:
    """Unite the breakpoints of several branches, for each input.

    Raises:
        CannotFit: a branch has too many.
    """
    known = [breakpoints for breakpoints in found if breakpoints is not None]
    if len(known) < len(found):
        raise CannotFit("it steps too often for a table")
    return [merge(torch.cat(parts)) for parts in zip(*known, strict=True)]


def _points(low: float, high: float) -> Tensor:
    """Give points dense where inputs are, and ever wider apart out to 10,000."""
    generator = torch.Generator().manual_seed(0)
    margin = 0.5 * (high - low) + 1e-2
    dense = torch.rand(320, generator=generator) * (high - low + 2 * margin) + low - margin
    far = torch.logspace(-2, 4, 180)
    points: Tensor = torch.unique(torch.cat([-far, torch.zeros(1), far, dense]))
    return points


def _readers(program: Program, layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Map every expansion that could be lowered to the layers that read it."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        for target in layer.expansions:
            module = program.module(target)
            if isinstance(module, Expansion) and not module.is_identity:
                found.setdefault(target, []).append(layer)
            elif not isinstance(module, Expansion | PolynomialExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: found {target!r} of type {type(module).__name__}, expected a float expansion"
                )
    return found


def _ranges(program: Program, x: Values, targets: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Find the smallest and the largest input of every expansion, in chunks of bounded memory."""
    wanted = list(targets)
    found = {target: (float("inf"), float("-inf")) for target in wanted}
    for part in x.split(_CHUNK) if wanted else ():
        for target, (arguments, _) in program.trace(part, wanted).items():
            low, high = (float(value) for value in torch.aminmax(arguments[0]))
            if not math.isfinite(high - low):
                raise KanCompileError(
                    f"expansion {target!r}: found inputs {low!r} ... {high!r} on the calibration data, expected finite ones; "
                    "check the scaling of the data"
                )
            found[target] = min(low, found[target][0]), max(high, found[target][1])
    return found


def _weights(program: Program, target: str, readers: Iterable[Layer]) -> int:
    """Count the bytes of the weights that read an expansion."""
    expansion = program.node(target, AnyExpansion)
    contractions = [program.contraction(layer) for layer in readers]
    return sum(4 * expansion.n_in * expansion.k * one.n_out * one.taps // one.groups for one in contractions)


def _apply(program: Program, target: str, expansion: Expansion, plan: _Plan) -> Program:
    """Put the polynomials in the place of their branches; the branches that stay follow in an expansion of their own."""
    kept = [number for number in range(len(expansion.branches)) if number not in plan.chosen]
    if not kept:
        return program.replace_modules({target: plan.lowered.module})
    stay = [expansion.branches[number] for number in kept]
    rest = Expansion(expansion.anchor_shape, stay, expansion.channels_first)  # type: ignore[arg-type]
    sizes = [int(branch.k) for branch in expansion.branches]  # type: ignore[arg-type]
    copy = program.replace_modules({target: plan.lowered.module})
    root, graph = copy.graph_module, copy.graph_module.graph
    second = _free_name(root, f"{target}_kept")
    root.add_module(second, rest)
    for node in [node for node in graph.nodes if node.op == "call_module" and node.target == target]:
        with graph.inserting_after(node):
            other = graph.call_module(second, node.args)
        for reader in list(node.users):
            if reader is not other:
                _read_both(program, root, reader, node, other, sizes, [plan.chosen, kept])
    root.recompile()
    return copy.with_graph(graph, root)


def _read_both(
    program: Program,
    root: nn.Module,
    reader: fx.Node,
    one: fx.Node,
    other: fx.Node,
    sizes: Sequence[int],
    parts: Sequence[Sequence[int]],
) -> None:
    """Let a contraction read two expansions where it read one, its weight columns in their order.

    Args:
        program: holds the modules as they were, also where another use of the layer reads two already.
        root: gets the contraction.
        reader: the contraction.
        one, other: the expansions; so far it read ``one`` only.
        sizes: number of functions of every branch.
        parts: which branches belong to ``one``, and which to ``other``.
    """
    contraction = program.node(str(reader.target), Contraction)
    groups = contraction.groups
    sources = list(reader.all_input_nodes)
    place = sources.index(one)
    read = [program.node(str(source.target), AnyExpansion) for source in sources]
    inputs, functions = [expansion.n_in for expansion in read], [expansion.k for expansion in read]
    start = sum(count * k for count, k in zip(inputs[:place], functions, strict=False)) // groups
    size = inputs[place] * sum(sizes) // groups
    old = torch.arange(start, start + size).reshape(inputs[place] // groups, -1)
    branch = torch.split(old, list(sizes), dim=1)
    columns = torch.arange(contraction.weight.shape[1])
    columns[start : start + size] = torch.cat([torch.cat([branch[n] for n in part], 1).flatten() for part in parts])
    weight = contraction.weight[:, columns].contiguous()
    root.add_module(str(reader.target), contraction.with_weight(weight))
    sources.insert(place + 1, other)
    reader.args = tuple(sources)


def _free_name(root: nn.Module, name: str) -> str:
    while hasattr(root, name):
        name += "_"
    return name


def lower_exactly(program: Program, x: Values, applies: Callable[[str], bool], costs: FunctionCosts) -> Program:
    """Lower with the first tolerance that keeps the output within ``OUTPUT_ERROR`` of its largest value, else the least.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        applies: says for a layer's name whether to lower it.
        costs: of operators.
    """
    few = x[:: max(1, len(x) // _COMPARED)][:_COMPARED]
    expected = joined(program(few))
    lowered = program
    for tolerance in TOLERANCES:
        lowered = LowerToPolynomials(tolerance, applies=applies, costs=costs)(program, x)
        error = float((joined(lowered(few)) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if error <= OUTPUT_ERROR:
            break
    return lowered


__all__ = [
    "LowerToPolynomials",
    "ObserveRegion",
    "Region",
    "find_breakpoints",
    "lower_exactly",
]
