"""Replace the float expansions of a layer by integer tables, and fold their scales into the map that reads them.

    y = W phi + b        ->        y = V (q - z) + b',      phi ~ s * (q - z),   V = W s for each column

Without padding every column has an offset of its own, part of ``b'``, and ``z`` is 0. Where a convolution pads, padding is 0 in
all columns, so that one code ``z`` stands for 0 in all of them, exactly, and a column that is never negative still gives up the
codes below it.

Errors are measured at what the outputs see (``lookup_cost``). The mean error of the lookups goes into the bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kancompile.ir import (
    Contraction,
    Expansion,
    IndexQuantizer,
    Layer,
    Program,
    TableExpansion,
    columns_of_groups,
    distinct_inputs,
    group_order,
    quantizer_in_front,
    reads_one_convolution,
    tables_behind,
)
from kancompile.passes.step_functions import step_quantizer
from kancompile.passes.tabulate_expansions.choose_index import (
    LEVELS,
    IndexChoice,
    choose_index,
    index_over,
    ranges,
    refine_ends,
)
from kancompile.passes.tabulate_expansions.codes import TableDraft, choose_codes
from kancompile.passes.tabulate_expansions.known import KnownTables, MeasuredInputs
from kancompile.passes.tabulate_expansions.lookup_cost import LookupCost
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.passes.tabulate_expansions.rectifier import identity_of, is_rectifier
from kancompile.passes.tabulate_expansions.values import (
    PRIOR,
    measured_samples,
    most_levels,
    values_at_rows,
    values_of_inputs,
)

_MEASURED_OUTPUTS = 1 << 21
_RANGES = {"lattice": "a row for each input value", "steps": "a row for each step of the functions"}
_MEAN_SAMPLES, _MEAN_ROWS, _MEAN_ELEMENTS = 32, 4096, 1 << 24
# share of what calibration saw in the variance of a column; all codes as likely take the rest (with 0.7 an MNIST network lost
# 1.4 dB, with 0 rational functions 0.5)
_SEEN = 0.3
# one row less than 8 bits can number lets a target look two inputs up at a time
_PAIRABLE_LEVELS = 255
_CAPPED = 2.0  # errors of lookups, in those of codes and weights, above which a limit of the rows is said


def tabulate_layer(
    program: Program,
    layer: Layer,
    inputs: dict[str, Tensor],
    options: TableOptions,
    samples: int,
    known: KnownTables,
    chosen_behind: bool = True,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Build the tables of one layer, and the contraction that reads them; a convolution's with a quantizer for its output.

    Args:
        program: a program whose expansions are float.
        layer: the layer.
        inputs: what each of its expansions reads, ``[n, ...]``.
        options: of the layer.
        samples: calibration samples used to measure errors.
        known: of the same program and inputs.
        chosen_behind: whether a table behind chooses the quantizer of a convolution's output.
    """
    contraction = program.node(layer.contraction, Contraction)
    groups = contraction.groups
    expansions = [program.node(target, Expansion) for target in layer.expansions]
    parts = torch.split(contraction.weight, [expansion.n_in // groups * expansion.k for expansion in expansions], dim=1)
    drafts, notes = [], []
    for target, expansion, part in zip(layer.expansions, expansions, parts, strict=True):
        x = measured_samples(inputs[target], samples)
        if options.levels is None and quantizer_in_front(program, target) is None and is_rectifier(expansion, x):
            expansion, x = identity_of(expansion), x.clamp(min=0)  # rows that begin at 0 rectify
        draft, note = _draft(program, layer, target, expansion, contraction, part, x, options, known)
        drafts.append(draft)
        notes.append(note)
    scales, offsets, zero_point = choose_codes(drafts, contraction, options)
    tables = [
        draft.table(scale, offset, zero_point, options.table_bits)
        for draft, scale, offset in zip(drafts, scales, offsets, strict=True)
    ]
    if options.table_bits < 8 and not all(table.packs for table in tables):
        size = sum(table.stored_bytes() for table in tables)
        notes.append(
            f"layer {layer.name!r}: table entries of {options.table_bits} bits are stored in bytes, {size:,} in all, since nodes "
            "that unpack bits would take more than they save"
        )
    modules: dict[str, nn.Module] = dict(zip(layer.expansions, tables, strict=True))
    modules[layer.contraction] = _folded(program, layer, contraction, tables, zero_point, inputs, chosen_behind)
    if contraction.pads:
        notes.append(f"layer {layer.name!r}: code {zero_point} stands for 0, which padding needs")
    return modules, notes


def _draft(
    program: Program,
    layer: Layer,
    target: str,
    expansion: Expansion,
    contraction: Contraction,
    part: Tensor,
    x: Tensor,
    options: TableOptions,
    known: KnownTables,
) -> tuple[TableDraft, str]:
    def measure() -> MeasuredInputs[LookupCost]:
        low, high = float(x.min()), float(x.max())
        first, group = distinct_inputs(expansion, low, high)
        steps = step_quantizer(expansion, x)
        return MeasuredInputs(first, group, LookupCost(expansion, contraction, part, x, group), steps)

    rectifies = expansion is not program.module(target)
    measured = known.inputs_of(f"{target} rectified" if rectifies else target, measure)
    first, group, cost = measured.first, measured.group, measured.cost
    other = cost.rounding_error(options.weight_bits, options.largest_code)
    most = most_levels(len(first) * expansion.k, part.numel())
    levels, capped = options.levels, ""
    if reads_one_convolution(program, target):
        # a convolution hands over 8 bits, and more rows than it tells apart would be of no use
        most = min(most, 256)
        if levels is not None and levels > 256:
            levels, capped = 256, f", not the {levels} asked for since a convolution hands over 8 bits"
        if levels is None and most == 256:
            levels = _PAIRABLE_LEVELS if len(first) == 1 else 256  # as many as a byte numbers, and no Clip behind
    fewest = LEVELS[0] if len(first) > 1 else min(255, most)
    if expansion.is_identity:  # more rows than codes would tell no more apart
        levels = options.largest_code + 1
    lowest = 0.0 if rectifies else -math.inf
    given = quantizer_in_front(program, target) if options.levels is None else None
    if given is not None:
        # the convolution in front rounds to 8 bits for several readers, so that these are all the values there are
        choice = IndexChoice(given, cost(given), "as the convolution in front has it")
    elif (steps := measured.steps) is not None and steps.levels <= (most if levels is None else levels):
        choice = IndexChoice(steps, cost(steps), "steps")
    else:
        choice = choose_index(cost, other, levels, options.range, most, fewest, options.percentile, lowest)
        if options.range == "mse" and choice.range != "lattice" and choice.error > 0.1 * other:
            choice = refine_ends(cost, choice)
    index = choice.index
    note = (
        f"layer {layer.name!r}: {'lookup table' if len(first) == 1 else f'{len(first)} lookup tables'} of {index.levels} rows "
        f"over {index.low:.4g} ... {index.high:.4g} ({_RANGES.get(choice.range, choice.range)}{capped}), lookup error "
        f"{choice.error:.3g}; {options.table_bits}-bit codes and {options.weight_bits}-bit weights would cause {other:.3g}"
    )
    if len(first) > 1 and options.levels is None and given is None and choice.error > _CAPPED * other:
        enough = next((count for count in LEVELS if choice.error * (index.levels / count) ** 2 <= other), LEVELS[-1])
        if enough > most:
            more = len(first) * expansion.k * (enough - index.levels)
            note += f"; size limits the rows, levels = {enough} takes {more:,} bytes more"
    values = (
        values_at_rows(expansion, index, x)
        if len(first) == 1
        else values_of_inputs(expansion, index, x, group, 0.0 if choice.range == "steps" else PRIOR)[
            :, first
        ].transpose(0, 1)
    )
    even = (values.amax(1) - values.amin(1)).square() / 12  # what a column varies by if all of its codes are as likely
    variance = _SEEN * cost.variance() + (1 - _SEEN) * even[group]
    return TableDraft(expansion, index, values, group, part, variance, partial(cost.code_hessian, index)), note


def _folded(
    program: Program,
    layer: Layer,
    contraction: Contraction,
    tables: Sequence[TableExpansion],
    zero_point: int,
    inputs: dict[str, Tensor],
    chosen_behind: bool,
) -> Contraction:
    """Fold scales, and offsets where nothing is padded, into weight and bias; choose the quantizer of the output."""
    groups, taps = contraction.groups, contraction.taps
    scales, offsets, sizes = [], [], []
    for table in tables:
        scales.append(table.column_scale().flatten())
        offsets.append(table.column_offset().flatten())
        sizes.append((table.n_in, table.k))
    order = group_order(sizes, groups)
    weights = contraction.flat_weight()
    scale = columns_of_groups(torch.cat(scales)[order], groups, taps)
    offset = columns_of_groups(torch.cat(offsets)[order], groups, taps)
    bias = contraction.bias
    if not contraction.pads:
        bias = bias + torch.cat([weight @ constant for weight, constant in zip(weights, offset, strict=True)])
    folded = torch.cat([weight * factor for weight, factor in zip(weights, scale, strict=True)])
    folded = folded.reshape(contraction.weight.shape)
    bias = bias + _mean_error(program, layer, contraction, tables, folded, bias, zero_point, inputs)
    # an integer convolution has an 8-bit output, which the one table behind it chooses, or the error where there are others
    decides = contraction.geometry is not None and not chosen_behind
    output = _output_quantizer(program, layer, contraction, inputs) if decides else None
    return contraction.replace(weight=folded, bias=bias, zero_point=zero_point, output=output, codes=None)


def _mean_error(
    program: Program,
    layer: Layer,
    contraction: Contraction,
    tables: Sequence[TableExpansion],
    weight: Tensor,
    bias: Tensor,
    zero_point: int,
    inputs: dict[str, Tensor],
) -> Tensor:
    """Measure by how much outputs of the float layer exceed those of the tables on average, ``[n_out]``."""
    looked_up = contraction.replace(weight=weight, bias=bias, zero_point=zero_point, output=None, codes=None)
    count = len(next(iter(inputs.values())))
    places = max(1, math.prod(contraction.out_shape) // contraction.n_out)
    columns = sum(inputs[target][0].numel() * t.k for target, t in zip(layer.expansions, tables, strict=True))
    wanted = max(_MEAN_SAMPLES, min(_MEAN_ROWS // places, _MEAN_ELEMENTS // columns))
    picked = torch.linspace(0, count - 1, min(count, wanted)).long()
    x = [inputs[target][picked] for target in layer.expansions]
    exact = contraction(*(program.module(target)(part) for target, part in zip(layer.expansions, x, strict=True)))
    found = looked_up(*(table(part) for table, part in zip(tables, x, strict=True)))
    error: Tensor = exact - found
    return contraction.by_output(error).double().mean(0).float()


def _output_quantizer(
    program: Program, layer: Layer, contraction: Contraction, inputs: dict[str, Tensor]
) -> IndexQuantizer:
    """Choose the 8-bit quantizer of outputs that others than one table read: the one of least squared error."""
    count = len(next(iter(inputs.values())))
    size = torch.Size(contraction.out_shape).numel()
    picked = torch.linspace(0, count - 1, min(count, max(32, _MEASURED_OUTPUTS // size))).long()
    outputs = []
    for part in torch.split(picked, 64):
        features = [program.module(target)(inputs[target][part]) for target in layer.expansions]
        outputs.append(contraction(*features))
    y = torch.cat(outputs)
    levels = _PAIRABLE_LEVELS if tables_behind(program, layer.contraction) else 256
    candidates = [index_over(low, high, levels) for _, low, high in ranges(y, "mse")]
    return min(candidates, key=lambda index: float((index.real(index(y)) - y).double().square().mean()))
