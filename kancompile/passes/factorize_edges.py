"""Replace functions of single edges by a few functions that all inputs share.

A wavelet with a scale and a shift of its own on every edge has no basis: an input has as many functions as there are
outputs, each used once. Where these functions resemble each other they nearly lie in a space of few dimensions::

    g[i, k](x) ~ sum over r of C[i, k, r] * psi_r(x)        (i: input, k: its functions, r < R)

    y = sum over i, k of W[o, i, k] * g[i, k](x[b, i])      ->      V[o, i, r] = sum over k of W[o, i, k] * C[i, k, r]
                                                                    y = sum over i, r of V[o, i, r] * psi_r(x[b, i])

``psi`` are the leading singular functions of the samples ``g[i, k](x_p)``, points weighted by how often calibration inputs
are near, functions by the size of their weights (Eckart and Young, 1936). R is the smallest rank tried whose *measured* error
at the layer's output is below the tolerance. Where no rank well below K does, the layer stays as it is and the note says
why. The singular functions are kept as a finely sampled table with linear interpolation, which the integer table samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kancompile.ir import (
    AnyExpansion,
    Branch,
    Contraction,
    Expansion,
    Layer,
    Program,
    Values,
    distinct_inputs,
    nodes_of,
)

_RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
_POINTS = (1 << 10, 1 << 12)
_EVALUATIONS = 1 << 25
_LATTICE = 1 << 12
_ROWS = 1 << 10
_MARGIN = 0.15  # of the range of the inputs on both sides, beyond every range that a table may cover
_UNSEEN = 1e-3  # share of the weight of points where calibration has no inputs
_MEASURED = 256
_CHUNK = 64


@dataclass(frozen=True)
class FactorizeEdges:
    """Factorize branches with many functions that differ between inputs.

    Attributes:
        applies: whether to look at a layer, by its name.
        tolerance: largest error at the layer's output, as root mean square relative to the output's own spread.
        gain: largest share of the functions that may remain for the rewrite to pay.
    """

    applies: Callable[[str], bool]
    tolerance: float = 1e-3
    gain: float = 0.75

    name = "factorize-edges"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with shared functions, or the same one where nothing changes.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        for layer in program.layers():
            for target in layer.expansions if self.applies(layer.name) else ():
                expansion = program.module(target)
                if not isinstance(expansion, Expansion) or not program.is_float(layer):
                    continue
                if _readers(program, target) != 1:
                    continue
                numbers = [n for n, branch in enumerate(expansion.branches) if branch.k >= 4]  # type: ignore[operator]
                if numbers:
                    program = self._factorize(program, layer, target, numbers, x)
        return program

    def _factorize(self, program: Program, layer: Layer, target: str, numbers: list[int], x: Values) -> Program:
        for number in numbers:
            expansion = program.node(target, Expansion)
            branch = expansion.branches[number]
            assert isinstance(branch, Branch)
            inputs = program.inputs(x, [target])[target]
            low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
            alone = Expansion(expansion.anchor_shape, [branch], expansion.channels_first)
            first, _ = distinct_inputs(alone, low, high)
            if len(first) < 2:
                continue
            functions = _Functions(alone, inputs, low, high, _importance(program, layer, target, number))
            program = self._best(program, layer, target, number, functions, x)
        return program

    def _best(
        self, program: Program, layer: Layer, target: str, number: int, functions: _Functions, x: Values
    ) -> Program:
        """Try ranks upwards; the smallest one within the tolerance is taken."""
        k = functions.k
        ranks = [rank for rank in _RANKS if rank <= min(self.gain * k, functions.rank)]
        promising = [rank for rank in ranks if functions.tail(rank) <= self.tolerance]
        measured = x[torch.linspace(0, len(x) - 1, min(len(x), _MEASURED)).long()]
        error = None
        for rank in promising:
            modules = _rewritten(program, layer, target, number, functions, rank)
            error = _output_error(program, modules, layer, measured)
            if error <= self.tolerance:
                note = (
                    f"layer {layer.name!r}: {k} functions of each input, different for every input, factorized into "
                    f"{rank} that all share, output error {error:.2g} of its spread"
                )
                return program.replace_modules(modules, [note])
        if not ranks:
            return program
        closest = functions.tail(ranks[-1]) if error is None else error
        note = (
            f"layer {layer.name!r}: {k} functions of each input stay as they are: {ranks[-1]} shared ones leave an error of "
            f"{closest:.2g}, expected at most {self.tolerance:g}"
        )
        return program if note in program.notes else program.replace_modules({}, [note])


class _Functions:
    """The functions of one branch, sampled, and their singular functions."""

    def __init__(self, expansion: Expansion, inputs: Tensor, low: float, high: float, importance: Tensor) -> None:
        """Sample and decompose.

        Args:
            expansion: of that branch alone.
            inputs: calibration inputs of the expansion.
            low, high: their range, 0 included.
            importance: size of the weights of every function, ``[n_in, k]``.
        """
        self.k, self.n_in = expansion.k, expansion.n_in
        margin = _MARGIN * (high - low) + 1e-6
        count = min(max(_EVALUATIONS // (self.n_in * self.k), _POINTS[0]), _POINTS[1])
        points = torch.linspace(low - margin, high + margin, count)
        seen = torch.unique(inputs)
        if len(seen) <= _LATTICE:  # pixels and counts: exact where the inputs are, whatever happens between
            points = torch.unique(torch.cat([points, seen]))
        self.points = points
        near = torch.bucketize(inputs.flatten(), (points[1:] + points[:-1]) / 2)
        counts = torch.bincount(near, minlength=len(points)).double()
        density = counts / counts.sum() + _UNSEEN / len(points)
        size = importance.flatten().double()
        usable = torch.nonzero(size > 0).flatten()
        rows = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))[:_ROWS]]
        sampled = torch.cat([part[:, rows] * size[rows] for part in _samples(expansion, points)])
        weighted = sampled * density[:, None].sqrt()
        energy, vectors = torch.linalg.eigh(weighted.T @ weighted)
        self.energy = energy.flip(0).clamp(min=0)
        self.rank = min(_RANKS[-1], int((self.energy > 1e-12 * self.energy[0]).sum()))
        self.shared = sampled @ (vectors.flip(1)[:, : self.rank] / self.energy[: self.rank].sqrt())  # [points, rank]
        self.expansion, self.density = expansion, density

    @functools.cached_property
    def _normal_equations(self) -> tuple[Tensor, Tensor]:
        """Products of the singular functions with each other, ``[rank, rank]``, and with all functions."""
        basis = self.shared * self.density[:, None]
        right = torch.zeros(self.rank, self.n_in * self.k, dtype=torch.float64)
        for part, values in zip(basis.split(_CHUNK), _samples(self.expansion, self.points), strict=True):
            right += part.T @ values
        return self.shared.T @ basis, right

    def tail(self, rank: int) -> float:
        """Relative error that the spectrum promises for a rank."""
        return float((self.energy[rank:].sum() / self.energy.sum().clamp(min=1e-300)).sqrt())

    def region(self, rank: int) -> fx.GraphModule:
        """Give the leading singular functions as a region, ``[b, *] -> [b, *, rank]``."""
        return fx.symbolic_trace(_Interpolated(self.points, self.shared[:, :rank]))

    def coefficients(self, rank: int) -> Tensor:
        """Fit all functions by the leading singular functions, float64 ``[n_in, k, rank]``."""
        gram, right = self._normal_equations
        ridge = 1e-12 * gram.diagonal().mean() * torch.eye(rank, dtype=torch.float64)
        fitted: Tensor = torch.linalg.solve(gram[:rank, :rank] + ridge, right[:rank])
        return fitted.T.reshape(self.n_in, self.k, rank)


def _samples(expansion: Expansion, points: Tensor) -> Iterator[Tensor]:
    """Evaluate all functions, some points at a time, float64 ``[points, n_in * k]``."""
    for part in points.split(_CHUNK):
        yield expansion.sample_inputs(part).flatten(1).double()


class _Interpolated(nn.Module):
    """Linear interpolation between points; constant beyond the outer ones."""

    inner: Tensor
    table: Tensor

    def __init__(self, points: Tensor, values: Tensor) -> None:
        """Take ascending ``points`` ``[p]`` and values ``[p, rank]``."""
        super().__init__()
        self.rank = values.shape[1]
        self.low, self.high = float(points[0]), float(points[-1])
        start, width = points[:-1, None].double(), points.diff()[:, None].double()
        rows = torch.cat([start, values[:-1], values.diff(dim=0) / width], dim=1)
        self.register_buffer("inner", points[1:-1])
        self.register_buffer("table", rows.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, *]`` to ``[b, *, rank]``."""
        x = x.clamp(self.low, self.high)
        rows = nn.functional.embedding(torch.bucketize(x.contiguous(), self.inner, right=True), self.table)
        offset = x.unsqueeze(-1) - rows[..., :1]
        values: Tensor = rows[..., 1 : 1 + self.rank] + offset * rows[..., 1 + self.rank :]
        return values


def _readers(program: Program, target: str) -> int:
    return len({user.target for node in nodes_of(program, target) for user in node.users})


def _columns(program: Program, layer: Layer, target: str) -> tuple[Tensor, int, int]:
    """Give one expansion's weights ``[groups, n_out / groups, n_in / groups, k, taps]`` and where its columns lie."""
    contraction = program.node(layer.contraction, Contraction)
    groups, start = contraction.groups, 0
    for other in layer.expansions:
        expansion = program.node(other, AnyExpansion)
        size = expansion.n_in * expansion.k // groups
        if other == target:
            break
        start += size
    weight = contraction.weight[:, start : start + size]
    shape = (groups, -1, expansion.n_in // groups, expansion.k, contraction.taps)
    return weight.reshape(shape), start, start + size


def _importance(program: Program, layer: Layer, target: str, number: int) -> Tensor:
    """Size of the weights of a branch's functions, ``[n_in, k]``."""
    weight, _, _ = _columns(program, layer, target)
    sizes = weight.square().sum((1, 4)).sqrt().flatten(0, 1)
    return sizes[:, _own(program, target, number)]


def _own(program: Program, target: str, number: int) -> slice:
    """Which of an expansion's functions belong to a branch."""
    sizes = [k for _, k in program.node(target, AnyExpansion).branch_functions]
    return slice(sum(sizes[:number]), sum(sizes[: number + 1]))


def _rewritten(
    program: Program, layer: Layer, target: str, number: int, functions: _Functions, rank: int
) -> dict[str, nn.Module]:
    """Build the expansion with shared functions in a branch's place, and the contraction that reads it."""
    expansion, contraction = program.node(target, Expansion), program.node(layer.contraction, Contraction)
    shape = (*expansion.anchor_shape, rank)
    position = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if expansion.channels_first:
        position = position.movedim(0, -2)
    branches = [branch for branch in expansion.branches if isinstance(branch, Branch)]
    shared = Branch(branches[number].name, functions.region(rank), position.reshape(*expansion.in_shape, rank))
    branches[number] = shared
    weight, start, end = _columns(program, layer, target)
    own = _own(program, target, number)
    fitted = functions.coefficients(rank).reshape(weight.shape[0], weight.shape[2], functions.k, rank)
    folded = torch.einsum("goikt,gikr->goirt", weight[..., own, :].double(), fitted).float()
    parts = [weight[..., : own.start, :], folded, weight[..., own.stop :, :]]
    new = torch.cat(parts, dim=3).reshape(contraction.n_out, -1, *contraction.kernel)
    columns = [contraction.weight[:, :start], new, contraction.weight[:, end:]]
    return {
        target: Expansion(expansion.anchor_shape, branches, expansion.channels_first),
        layer.contraction: contraction.with_weight(torch.cat(columns, dim=1)),
    }


def _output_error(program: Program, modules: dict[str, nn.Module], layer: Layer, x: Values) -> float:
    """Measure the root mean square error of a layer's output, relative to its spread over samples."""
    changed = program.replace_modules(modules)
    expected, found = (p.trace(x, [layer.contraction])[layer.contraction][1] for p in (program, changed))
    spread = (expected - expected.mean(0)).double().square().mean().sqrt().clamp(min=1e-30)
    return float((found - expected).double().square().mean().sqrt() / spread)
