"""The law of programs: what every pass must leave intact."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir.contraction import Contraction, QuantizedContraction
from kancompile.ir.convolution import ConvContraction, QuantizedConvContraction
from kancompile.ir.expansion import Expansion
from kancompile.ir.polynomial import PolynomialExpansion
from kancompile.ir.program import INTEGER_CONTRACTIONS, Layer, Program
from kancompile.ir.table import TableExpansion


def check(program: Program) -> None:
    """Verify the invariants that every pass must leave intact.

    Raises:
        KanCompileError: a KAN module reads something else than its kind allows, or sizes do not agree.
    """
    graph = program.graph_module.graph
    graph.lint()
    for layer in program.layers():
        contraction = program.module(layer.contraction)
        columns = 0
        for target in layer.expansions:
            expansion = program.module(target)
            if not isinstance(expansion, Expansion | PolynomialExpansion | TableExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: contraction reads {target!r} of type {type(expansion).__name__}, "
                    "expected an expansion"
                )
            columns += expansion.n_in * expansion.k
            if isinstance(contraction, INTEGER_CONTRACTIONS) and not isinstance(expansion, TableExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: integer contraction reads float expansion {target!r}; "
                    "tabulate it before rounding the weights"
                )
        if isinstance(contraction, Contraction):
            _expect(layer.name, "weight columns", contraction.weight.shape[1], columns)
            _expect(layer.name, "bias length", contraction.bias.numel(), contraction.n_out)
            _expect_finite(layer.name, "weight", contraction.weight)
        if isinstance(contraction, QuantizedContraction):
            _expect(layer.name, "grouped columns", sum(contraction.group_sizes), columns)
            for codes, scale in zip(contraction.weights, contraction.scales, strict=True):
                _expect(layer.name, "scales", scale.numel(), contraction.n_out)
                _check_codes(layer.name, codes, scale, contraction.product_bits)
            if contraction.multiplier is not None:
                factors = contraction.multiplier.of_column()
                _expect(layer.name, "weights that are no multiple", int((contraction.weights[0] % factors).any()), 0)
                narrow = contraction.weights[0] // factors
                _check_codes(layer.name, narrow, contraction.scales[0], contraction.weight_bits)
        if isinstance(contraction, ConvContraction | QuantizedConvContraction):
            _check_convolution(program, layer, contraction, columns)


def _check_codes(layer: str, codes: Tensor, scale: Tensor, bits: int) -> None:
    limit = 1 << (bits - 1)
    _expect_finite(layer, "scale", scale)
    low, high = int(codes.min()), int(codes.max())
    if low < -limit or high >= limit:
        raise KanCompileError(f"layer {layer!r}: weight codes {low} ... {high} do not fit {bits} bits")


def _check_convolution(
    program: Program, layer: Layer, contraction: ConvContraction | QuantizedConvContraction, columns: int
) -> None:
    geometry, name = contraction.geometry, layer.name
    _expect(name, "weight columns of a group", contraction.weight.shape[1], columns // geometry.groups)
    _expect(name, "output channels left over by the groups", contraction.n_out % geometry.groups, 0)
    _expect(name, "bias length", contraction.bias.numel(), contraction.n_out)
    for target in layer.expansions:
        expansion = program.module(target)
        assert isinstance(expansion, Expansion | PolynomialExpansion | TableExpansion)
        _expect(name, "input channels left over by the groups", expansion.n_in % geometry.groups, 0)
        _expect(name, "spatial dimensions", len(expansion.in_shape) - 1, len(contraction.kernel))
        out_shape = (contraction.n_out, *geometry.out_size(expansion.in_shape[:-1], contraction.kernel))
        if out_shape != contraction.out_shape:
            raise KanCompileError(
                f"layer {name!r}: found output shape {contraction.out_shape!r}, expected {out_shape!r} for an input of "
                f"{expansion.in_shape!r} (channels last)"
            )
    if isinstance(contraction, QuantizedConvContraction):
        _expect(name, "scales", contraction.scale.numel(), contraction.n_out)
        _check_codes(name, contraction.weight, contraction.scale, contraction.weight_bits)
        if contraction.output is not None:
            _expect(name, "levels above 256 in the output", max(0, contraction.output.levels - 256), 0)
    else:
        _expect_finite(name, "weight", contraction.weight)


def _expect(layer: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise KanCompileError(f"layer {layer!r}: found {found} {what}, expected {expected}")


def _expect_finite(layer: str, what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise KanCompileError(f"layer {layer!r}: {what} has NaN or infinite values; retrain or repair the checkpoint")
