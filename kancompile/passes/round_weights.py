"""Round the weights of every layer, first to last, each on what the layers before it really hand over.

    y = V q + b   (float V, table codes q)     ->     y = scale * (C q + B)     (integer C and B)

Layer by layer: the features of a layer are computed by the program in which all earlier layers are rounded already, so
that its rounding can make up for their errors. The bias joins the integer sum in units of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir.contraction import Contraction, GroupMultiplier, QuantizedContraction
from kancompile.ir.convolution import ConvContraction
from kancompile.ir.program import Layer, Program
from kancompile.ir.table import TableExpansion
from kancompile.ir.wiring import branch_of_column, layer_tables, tied_columns
from kancompile.pair_products import AdjacentPairs, IntegerContraction, layer_pairs
from kancompile.passes.brecq import Brecq
from kancompile.passes.gptq import Gptq
from kancompile.passes.group_scales import WIDEST_BITS, common_scale, settle_group_scales, snap_scales
from kancompile.passes.guard import with_guard
from kancompile.passes.limit_pairs import limit_layer
from kancompile.passes.reconstruct_blocks import blocks_of, reconstruct_block, with_one_end
from kancompile.passes.round_convolutions import convolution_problems, integer_convolution, merge_groups
from kancompile.passes.uniform import Uniform
from kancompile.progress import track
from kancompile.rounding import FeatureSource, Method, Rounded, RoundingProblem, objective

_INT32_MAX = (1 << 31) - 1
_CHUNK = 512
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class RoundingOptions:
    """What a recipe says about the weights of one layer.

    Attributes:
        method: a rounding method.
        method_name: how reports call it.
        bits: 2 to 8.
        granularity: ``"channel"``: one scale for each output; ``"branch"``: and for each expansion the layer reads;
            ``"group"``: and for each ``group_size`` inputs.
        group_size: inputs in a group.
        int16_pairs: whether sums of two neighbouring products must fit int16 (see ``passes.limit_pairs``).
    """

    method: Method
    method_name: str
    bits: int = 8
    granularity: str = "channel"
    group_size: int | None = None
    int16_pairs: bool = False

    @property
    def shares_scale(self) -> bool:
        """Whether the scales of groups are whole multiples of one, so that the layer stays one product."""
        return self.granularity == "group" and self.bits <= WIDEST_BITS


@dataclass(frozen=True)
class RoundWeights:
    """Round every contraction that reads tables; rounded ones and those of float layers stay.

    Attributes:
        options: gives the options of a layer by its name.
        seed: of the generator that methods draw from; each layer has its own.
        block_size: consecutive layers that BRECQ reconstructs together.
    """

    options: Callable[[str], RoundingOptions]
    seed: int = 0
    block_size: int = 2

    name = "round-weights"

    def __call__(self, program: Program, x: Tensor) -> Program:
        """Return the rounded program.

        Args:
            program: a tabulated program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        reference = program
        layers = [layer for layer in program.layers() if _reads_tables(program, layer)]
        problems: dict[str, RoundingProblem] = {}
        rounded: dict[str, Rounded] = {}
        for number, layer in enumerate(track(layers, "rounding weights")):
            options = self.options(layer.name)
            stated = layer_problems(program, layer, x, options, self._generator(number))
            solved = round_layer(stated, options, self._generator(number))
            polishing = None if isinstance(options.method, Uniform) else Gptq()
            solved = fit_pairs(reference, layer, stated, solved, options, self._generator(number), polishing)
            rounded[layer.name], notes = merge_groups(solved.parts), list(solved.notes)
            if options.granularity != "channel" and isinstance(program.module(layer.contraction), ConvContraction):
                notes.append(
                    f"layer {layer.name!r}: one weight scale for each output channel, not for each {options.granularity}, "
                    "since an integer convolution has no more"
                )
            if len(stated) == 1:
                problems[layer.name] = stated[0]
            elif isinstance(options.method, Brecq):
                notes.append(
                    f"layer {layer.name!r}: rounded by the first stage of brecq alone, since its {len(stated)} channel groups "
                    "are rounded apart; no block reconstruction"
                )
            modules = integer_modules(reference, layer, rounded[layer.name], solved.bits, options.shares_scale)
            program = program.replace_modules(modules, notes)
        # channel groups of a convolution are several problems; those layers keep what their own reconstruction gave
        learned = [
            layer for layer in layers if layer.name in problems and isinstance(self.options(layer.name).method, Brecq)
        ]
        blocks = [part for block in blocks_of(learned, self.block_size) for part in with_one_end(program, block)]
        for number, block in enumerate(track(blocks, "reconstructing blocks")):
            method = self.options(block[0].name).method
            assert isinstance(method, Brecq)
            generator = self._generator(len(layers) + number)
            improved = reconstruct_block(program, reference, block, problems, rounded, x, method, generator)
            modules, notes = {}, [improved[block[-1].name].notes[-1]]
            for layer in block:
                options, stated = self.options(layer.name), (problems[layer.name],)
                final = improved[layer.name]
                if options.shares_scale:
                    final = snap_scales(problems[layer.name], final)
                solved = SolvedLayer([final], options.bits, ())
                solved = fit_pairs(reference, layer, stated, solved, options, generator)
                modules |= integer_modules(reference, layer, solved.parts[0], solved.bits, options.shares_scale)
                notes += solved.notes
            program = program.replace_modules(modules, notes)
        return program

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000003 * number)


def _reads_tables(program: Program, layer: Layer) -> bool:
    return isinstance(program.module(layer.contraction), Contraction | ConvContraction) and all(
        isinstance(program.module(target), TableExpansion) for target in layer.expansions
    )


def layer_problems(
    program: Program, layer: Layer, x: Tensor, options: RoundingOptions, generator: torch.Generator
) -> tuple[RoundingProblem, ...]:
    """State the rounding problems of one layer: one, or one for each channel group of a convolution."""
    if isinstance(program.module(layer.contraction), ConvContraction):
        return convolution_problems(program, layer, x, options.bits, generator)
    return (layer_problem(program, layer, x, options),)


def layer_problem(program: Program, layer: Layer, x: Tensor, options: RoundingOptions) -> RoundingProblem:
    """State the rounding problem of one layer of a program whose earlier layers are rounded."""
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, Contraction)
    tables = layer_tables(program, layer)
    return RoundingProblem(
        layer.name,
        contraction.weight,
        layer_features(program, layer, x),
        options.bits,
        group_sizes(tables, options),
        branch_of_column(tables),
        tied_columns(tables),
    )


@dataclass(frozen=True)
class SolvedLayer:
    """The rounding problems of one layer, solved.

    Attributes:
        parts: one rounding for each.
        bits: of the weights.
        notes: lines for the report.
    """

    parts: list[Rounded]
    bits: int
    notes: tuple[str, ...]


def round_layer(
    problems: Sequence[RoundingProblem], options: RoundingOptions, generator: torch.Generator
) -> SolvedLayer:
    """Round one layer with one method, and say how it compares with rounding to nearest.

    The better of the two on the calibration data is returned, and a note says so where that is not the method asked for.
    """
    parts = [with_guard(options.method)(problem, generator) for problem in problems]
    if options.shares_scale:
        parts = [
            settle_group_scales(problem, part, options.method) if len(part.group_sizes) > 1 else part
            for problem, part in zip(problems, parts, strict=True)
        ]
    what = f"layer {problems[0].layer!r}: {options.bits}-bit weights by {options.method_name}"
    if isinstance(options.method, Uniform):
        errors = [objective(problem, part) for problem, part in zip(problems, parts, strict=True)]
        notes = [f"{what}, mean squared output error {sum(errors) / len(errors):.4g}"]
    else:
        notes = [f"{what}, {line}" for line in dict.fromkeys(line for part in parts for line in part.notes)]
    return SolvedLayer(parts, options.bits, tuple(notes))


def fit_pairs(
    program: Program,
    layer: Layer,
    problems: Sequence[RoundingProblem],
    solved: SolvedLayer,
    options: RoundingOptions,
    generator: torch.Generator,
    polishing: Gptq | None = None,
) -> SolvedLayer:
    """Make sums of two neighbouring products fit int16 where that is asked for; they always do below 8 bits.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        problems, solved: its rounding problems and their solution.
        options: of the layer.
        generator: for another rounding, where that is needed.
        polishing: see :func:`limit_layer`; not after a block was reconstructed, whose objective is another one.
    """
    if not options.int16_pairs or solved.bits < 8:
        return solved

    def pairs_of(parts: Sequence[Rounded]) -> Sequence[AdjacentPairs]:
        modules = integer_modules(program, layer, merge_groups(parts), solved.bits)
        contraction = modules[layer.contraction]
        assert isinstance(contraction, IntegerContraction)
        return layer_pairs(contraction, layer_tables(program.replace_modules(modules), layer))

    def again(bits: int) -> list[Rounded]:
        return round_layer([replace(problem, bits=bits) for problem in problems], options, generator).parts

    limited = limit_layer(problems, solved.parts, pairs_of, again, polishing)
    if limited is None:
        return solved
    return SolvedLayer(limited.parts, limited.bits, (*solved.notes, f"layer {layer.name!r}: {limited.note()}"))


def integer_modules(
    program: Program, layer: Layer, rounded: Rounded, bits: int, shares_scale: bool = False
) -> dict[str, nn.Module]:
    """Build the modules of a rounded layer: the contraction, and tables whose columns the method rescaled.

    Args:
        program: the tabulated program, with the layer's float contraction and original tables.
        layer: the layer.
        rounded: its rounding.
        bits: of its weights.
        shares_scale: whether scales of groups are multiples of one and become part of the weights.
    """
    contraction = program.module(layer.contraction)
    if isinstance(contraction, ConvContraction):
        return integer_convolution(program, layer, rounded, bits)
    assert isinstance(contraction, Contraction)
    modules: dict[str, nn.Module] = {layer.contraction: to_integers(contraction, rounded, bits, shares_scale)}
    if rounded.column_scale is not None:
        tables = layer_tables(program, layer)
        modules |= dict(zip(layer.expansions, rescale_tables(tables, rounded.column_scale), strict=True))
    return modules


def rescale_tables(tables: Sequence[TableExpansion], column_scale: Tensor) -> list[TableExpansion]:
    """Let every table column use only a fraction of its code range, ``column_scale`` ``[c]``, equal in tied columns."""
    ties = tied_columns(tables)
    of_tie = torch.ones(int(ties.max()) + 1)
    of_tie[ties] = column_scale
    rescaled, start = [], 0
    for table in tables:
        size = table.n_tables * table.k
        fraction = of_tie[start : start + size].reshape(table.n_tables, table.k)
        start += size
        codes = table.table.reshape(table.n_tables, table.index.levels, table.k).float()
        narrowed = torch.round(codes * fraction[:, None]).to(torch.uint8)
        rescaled.append(table.with_codes(narrowed.flatten(0, 1), table.scale / fraction))
    return rescaled


def layer_features(program: Program, layer: Layer, x: Tensor) -> FeatureSource:
    """Give the table codes that reach a layer, uint8 ``[n *, c]``; recomputed chunk by chunk where they are many."""
    n, columns = len(x), _columns(program, layer, x[:1]).shape
    rows = n * columns[0]

    def chunks() -> Iterator[Tensor]:
        for part in x.split(_CHUNK):
            yield _columns(program, layer, part)

    if rows * columns[1] <= _KEPT_BYTES:
        kept = list(chunks())
        return FeatureSource(lambda: iter(kept), rows, columns[1])
    return FeatureSource(chunks, rows, columns[1])


def _columns(program: Program, layer: Layer, x: Tensor) -> Tensor:
    traced = program.trace(x, layer.expansions)
    features = [traced[target][1].flatten(-2) for target in layer.expansions]
    return torch.cat(features, dim=-1).flatten(0, -2)


def group_sizes(tables: Sequence[TableExpansion], options: RoundingOptions) -> tuple[int, ...]:
    """Divide the columns of a layer into scale groups."""
    sizes: list[int] = []
    for table in tables:
        columns = table.n_in * table.k
        if options.granularity == "group" and options.group_size is not None:
            step = options.group_size * table.k
            sizes += [min(step, columns - start) for start in range(0, columns, step)]
        else:
            sizes.append(columns)
    return (sum(sizes),) if options.granularity == "channel" else tuple(sizes)


def to_integers(
    contraction: Contraction, rounded: Rounded, bits: int, shares_scale: bool = False
) -> QuantizedContraction:
    """Join codes, scales and bias to an integer contraction; with ``shares_scale`` one of a single scale group.

    Raises:
        KanCompileError: a sum could leave the int32 accumulator, or the bias does not fit.
    """
    scale, codes, multiplier = rounded.scale, rounded.codes.T.contiguous(), None
    group_sizes = rounded.group_sizes
    if shares_scale and len(group_sizes) > 1:
        base, factors = common_scale(scale, bits)
        multiplier = GroupMultiplier(factors, group_sizes)
        scale, codes, group_sizes = base[None], codes * multiplier.of_column(), (codes.shape[0],)
    scale = _representable(scale, contraction.bias + rounded.offset)
    bias = torch.round((contraction.bias + rounded.offset).double() / scale[0].double())
    largest = codes.double().abs().sum(0) * 255 + bias.abs()
    if float(largest.max()) > _INT32_MAX:
        raise KanCompileError(
            f"layer {contraction.layer!r}: a sum of {codes.shape[0]} products may reach {float(largest.max()):.3g}, "
            f"more than the int32 accumulator holds ({_INT32_MAX}); use fewer weight bits for this layer"
        )
    return QuantizedContraction(
        contraction.layer,
        codes,
        bias.to(torch.int32),
        scale,
        contraction.out_shape,
        bits,
        group_sizes,
        multiplier=multiplier,
    )


def _representable(scale: Tensor, bias: Tensor) -> Tensor:
    """Raise scales so small that the bias in their units would leave int32: outputs whose weights all round to 0."""
    least = bias.abs() / (1 << 28)
    first = torch.maximum(scale[0], least.clamp(min=1e-30))
    return torch.cat([first[None], scale[1:]])
