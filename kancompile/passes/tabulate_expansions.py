"""Replace every float expansion by an integer table and fold the table's scales into the weights.

    phi = expand(x)                  q = table[index(x)]              (uint8)
    y = W phi + b          ->        y = V q + b'

with ``phi ~ s * q + z`` for each column, ``V = W diag(s)`` and ``b' = b + W z``. The program then computes in float on
integer features, which is what weight rounding works on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.modules import Contraction, Expansion, IndexQuantizer, TableExpansion
from kancompile.passes.choose_index import LookupCost, Range, choose_index, row_inputs
from kancompile.program import Layer, Program

_PROBES = 769
_SAME = 1e-6
_STRETCH = (0.0, 0.5, 1.0)
_MEASURED_INPUTS = 1 << 17


@dataclass(frozen=True)
class TableOptions:
    """What a recipe says about the tables of one layer.

    Attributes:
        levels: rows of the table, or ``None`` to choose by measured error.
        range: which input ranges to try.
        weight_bits: bits of the weights that will read the table; their error sets how fine a table need be.
        column_scaling: exponent with which columns are stretched to the full 8 bits (1: each its own range, 0: all the
            range of the largest), or ``None`` to choose by measured error.
    """

    levels: int | None = None
    range: Range = "mse"
    weight_bits: int = 8
    column_scaling: float | None = None


@dataclass(frozen=True)
class TabulateExpansions:
    """Tabulate the expansions of every layer; layers that already are tables stay.

    Attributes:
        options: gives the options of a layer by its name.
        samples: calibration samples used to measure errors (ranges always use all of them).
    """

    options: Callable[[str], TableOptions]
    samples: int = 256

    name = "tabulate-expansions"

    def __call__(self, program: Program, x: Tensor) -> Program:
        """Return the tabulated program.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        layers = [layer for layer in program.layers() if isinstance(program.module(layer.contraction), Contraction)]
        wanted = [target for layer in layers for target in layer.expansions]
        if not any(isinstance(program.module(target), Expansion) for target in wanted):
            return program
        traced = program.trace(x, wanted)
        replaced: dict[str, nn.Module] = {}
        notes: list[str] = []
        for layer in layers:
            inputs = {target: traced[target][0][0] for target in layer.expansions}
            modules, said = tabulate_layer(program, layer, inputs, self.options(layer.name), self.samples)
            replaced |= modules
            notes += said
        return program.replace_modules(replaced, notes)


def tabulate_layer(
    program: Program, layer: Layer, inputs: dict[str, Tensor], options: TableOptions, samples: int
) -> tuple[dict[str, nn.Module], list[str]]:
    """Build the tables of one layer and the contraction that reads them."""
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, Contraction)
    weight, bias = contraction.weight, contraction.bias
    modules: dict[str, nn.Module] = {}
    notes = []
    folded = []
    start = 0
    for target in layer.expansions:
        expansion = program.module(target)
        assert isinstance(expansion, Expansion)
        size = expansion.n_in * expansion.k
        part = weight[:, start : start + size]
        x = inputs[target].reshape(-1, *expansion.in_shape)
        first, group = distinct_inputs(expansion, float(x.min()), float(x.max()))
        cost = LookupCost(expansion, measured_samples(x, samples), part, shared=len(first) == 1)
        other = rounding_error(cost.exact, part, options.weight_bits)
        most = most_levels(len(first) * expansion.k, part.numel())
        choice = choose_index(cost, other, options.levels, options.range, most)
        table = tabulate(expansion, choice.index, x, first, group, part, options)
        notes.append(
            f"layer {layer.name!r}: table of {choice.index.levels} rows over {choice.index.low:.4g} ... "
            f"{choice.index.high:.4g} ({choice.range}), {table.n_tables} distinct, look-up error "
            f"{choice.error:.3g} beside {other:.3g} of 8-bit codes and {options.weight_bits}-bit weights"
        )
        modules[target] = table
        bias = bias + part @ table.column_offset().flatten()
        folded.append(part * table.column_scale().flatten())
        start += size
    modules[layer.contraction] = Contraction(contraction.layer, torch.cat(folded, dim=1), bias, contraction.out_shape)
    return modules, notes


def measured_samples(x: Tensor, samples: int) -> Tensor:
    """Take samples at even distances, and those that hold the smallest and the largest input of all."""
    n_in = x[0].numel()
    wanted = max(32, min(samples, _MEASURED_INPUTS // n_in))
    flat = x.flatten(1)
    extremes = torch.stack([flat.amin(1).argmin(), flat.amax(1).argmax()])
    return torch.cat([x[:: max(1, len(x) // wanted)][:wanted], x[extremes]])


def most_levels(row_bytes: int, weight_bytes: int) -> int:
    """Bound the rows so that the tables of inputs that share none stay below the weights in size (at least 64 KiB)."""
    return max(16, min(4096, max(1 << 16, weight_bytes) // row_bytes))


def rounding_error(phi: Tensor, weight: Tensor, bits: int) -> float:
    """Estimate what 8-bit table codes and ``bits``-bit weights cost at the output, as mean squared error.

    Codes: uniform rounding noise of each column's range, ``(range / 255)^2 / 12``, through the weights. Weights: round
    to nearest with one scale per output, on the centred features (the bias absorbs the mean).
    """
    columns = phi.flatten(0, -3).flatten(1) if phi.dim() > 3 else phi.flatten(1)
    spread = (columns.amax(0) - columns.amin(0)) / 255
    codes = float((weight.square() * (spread.square() / 12)).sum(1).mean())
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    rounded = torch.round(weight / scale) * scale
    weights = float(((columns - columns.mean(0)) @ (weight - rounded).T).square().mean())
    return codes + weights


def distinct_inputs(expansion: Expansion, low: float, high: float) -> tuple[list[int], Tensor]:
    """Find which inputs share all their functions.

    Returns:
        the first input of each distinct set of functions, and for every input the number of its set, int64 ``[n_in]``.
    """
    margin = 0.5 * (high - low) + 1e-3
    generator = torch.Generator().manual_seed(0)  # irregular probes, so that no lattice of knots hides between them
    points = torch.rand(_PROBES, generator=generator).sort().values * (high - low + 2 * margin) + low - margin
    values = torch.cat([_first_lead(expansion, expansion.sample(part)) for part in points.split(64)])
    values = values.transpose(0, 1).flatten(1)
    values = values / values.abs().amax().clamp(min=1e-30)
    group = torch.full((len(values),), -1, dtype=torch.int64)
    first: list[int] = []
    while bool((group < 0).any()):
        leader = int((group < 0).nonzero()[0])
        alike = (group < 0) & ((values - values[leader]).abs().amax(1) <= _SAME)
        group[alike] = len(first)
        first.append(leader)
    return first, group


def _first_lead(expansion: Expansion, values: Tensor) -> Tensor:
    """Drop leading dimensions that the layer treats alike: ``[n, *, n_in, k]`` to ``[n, n_in, k]``."""
    return values if len(expansion.in_shape) == 1 else values.flatten(1, -3)[:, 0]


def tabulate(
    expansion: Expansion,
    index: IndexQuantizer,
    x: Tensor,
    first: list[int],
    group: Tensor,
    weight: Tensor,
    options: TableOptions,
) -> TableExpansion:
    """Sample the functions at every row and round them to uint8, with the column scales that cost least.

    Args:
        expansion: the float expansion.
        index: its index quantizer.
        x: calibration inputs ``[n, *in_shape]``.
        first, group: the distinct inputs (see :func:`distinct_inputs`).
        weight: this expansion's columns ``[n_out, n_in * k]``.
        options: of the layer.
    """
    if len(first) == 1:
        values = expansion.sample_shared(row_inputs(index, x))[None]
    else:
        sampled = [_first_lead(expansion, expansion.sample(part))[:, first] for part in index.rows().split(64)]
        values = torch.cat(sampled).transpose(0, 1)  # [T, levels, k]
    low, high = values.amin(1), values.amax(1)  # [T, k]
    exponents = _STRETCH if options.column_scaling is None else (options.column_scaling,)
    best = min(
        (code_scale(high - low, exponent) for exponent in exponents),
        key=lambda scale: scaling_error(scale, high - low, group, weight, options.weight_bits),
    )
    codes = torch.round((values - low[:, None]) / best[:, None]).clamp(0, 255).to(torch.uint8)
    return TableExpansion(
        expansion.in_shape,
        index,
        codes.flatten(0, 1).contiguous(),
        None if len(first) == 1 else (group * index.levels).to(torch.int32),
        best,
        low,
        [branch.k for branch in expansion.branches],  # type: ignore[misc]
        [branch.name for branch in expansion.branches],  # type: ignore[misc]
    )


def code_scale(spread: Tensor, exponent: float) -> Tensor:
    """Value of one code step, ``spread^exponent * max(spread)^(1 - exponent) / 255``; 1 for constant columns."""
    largest = spread.amax().clamp(min=1e-30)
    scale = spread.clamp(min=1e-12).pow(exponent) * largest.pow(1 - exponent) / 255
    return torch.where(spread > 0, torch.maximum(scale, spread / 255), torch.ones_like(spread))


def scaling_error(scale: Tensor, spread: Tensor, group: Tensor, weight: Tensor, bits: int) -> float:
    """Estimate the error of column scales: coarse small columns against weights of unequal size.

    Codes cost ``scale^2 / 12`` through the weights; weights, rounded with one step per output, cost ``step^2 / 12``
    through the variance of a code, taken as that of a column that uses its range evenly.
    """
    columns = scale[group].flatten()
    code_spread = (spread / scale)[group].flatten()
    codes = (weight.square() * columns.square() / 12).sum(1)
    step = (weight * columns).abs().amax(1) / (2 ** (bits - 1) - 1)
    weights = step.square() / 12 * (code_spread.square() / 12).sum()
    return float((codes + weights).mean())
