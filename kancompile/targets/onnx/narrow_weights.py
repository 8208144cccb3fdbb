"""Store weight codes in as few bytes as their bits need, while they compute as int8.

A DequantizeLinear straight on a narrow tensor has no fused kernel. So narrow codes are stored apart from how they compute, and
the file says how the one becomes the other. ONNX Runtime folds these constant nodes when it loads the file; the product then
is the same integer kernel at the same speed::

    ternary:      uint8, sum over j of (code_j + 1) 3^j for five codes
                  -> Div, Mod; minus 1
    2 to 7 bits:  uint8 planes of 4, 2 and 1 bits, each holding 2, 4 or 8 codes in a byte
                  -> BitwiseAnd, BitShift, Cast; planes times their weights are summed -> minus the offset

Where groups of rows differ in scale by whole factors, the factors are stored beside the codes and multiplied in likewise.

That is opset 21 and loads in every ONNX Runtime from 1.20 on. ONNX has tensors of 4 bits, and from opset 25 on of 2, but ONNX
Runtime 1.20 has no Cast from int4, and nothing stores 3 bits in 3.

Tools that read ONNX tensors know types, not planes. ``storage="native"`` is for them: the narrowest type that holds the
codes, int2 (opset 25, ONNX Runtime from 1.24 on), int4 (ONNX Runtime from 1.22 on) or int8, with a Cast to int8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kancompile.ir import TRITS, GroupMultiplier
from kancompile.targets.onnx.folded_nodes import FoldedNodes

PLANE_BITS = (4, 2, 1)
INT2_OPSET, INT2_IR_VERSION = 25, 13


def plane_widths(bits: int) -> list[int]:
    """Divide 2 to 7 bits into planes, widest first: 7 -> 4, 2, 1."""
    return [width for width in PLANE_BITS if bits & width]


@dataclass(frozen=True)
class NarrowWeights:
    """What a file stores in place of int8 weights.

    Attributes:
        bits: of the codes, 2 to 7.
        multiplier: factors of groups of rows, where the weights are codes times factors.
        trits: whether codes are -1, 0 and 1, and stand five in a byte.
    """

    bits: int
    multiplier: GroupMultiplier | None = None
    trits: bool = False


def native_type(bits: int) -> ir.DataType:
    """Return the narrowest ONNX type that holds codes of 2 to 8 bits."""
    return ir.DataType.INT2 if bits == 2 else ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8


def store_narrow_weights(model: ir.Model, narrow: Mapping[str, NarrowWeights], native: bool = False) -> None:
    """Exchange int8 initializers for narrow ones and the nodes that widen them, in place.

    Args:
        model: the model; its opset is raised to 25 where it gets an int2 tensor.
        narrow: name of an initializer to what is stored in its place. One that the exporter merged with an equal one is
            stored with that.
        native: use tensors of the narrowest type that holds the codes, never planes.
    """
    for name, weights in narrow.items():
        value = model.graph.initializers.get(name)
        if value is None:
            continue
        assert value.const_value is not None
        bits = weights.bits
        stored = native_type(bits)
        if native and stored == ir.DataType.INT8:
            continue
        codes, factors = value.const_value.numpy(), weights.multiplier
        if factors is not None:
            codes = codes // factors.of_column().numpy()
        nodes = FoldedNodes(model.graph, name)
        if native:
            widened = _cast(nodes, codes, stored)
        else:
            widened = _digits(nodes, codes) if weights.trits else _sum_planes(nodes, codes, bits)
        if factors is not None:
            widened = _multiply_groups(nodes, widened, factors.factors.numpy(), factors.group_sizes)
        value.replace_all_uses_with(widened)
        if native and stored == ir.DataType.INT2:
            # every operator of the file means the same in opset 25, which adds types
            model.graph.opset_imports[""] = INT2_OPSET
            model.ir_version = INT2_IR_VERSION


def _cast(nodes: FoldedNodes, codes: NDArray[np.int8], stored: ir.DataType) -> ir.Value:
    narrow = codes.astype(ml_dtypes.int2 if stored == ir.DataType.INT2 else ml_dtypes.int4)
    return nodes.cast(nodes.stored(stored.name.lower(), narrow), ir.DataType.INT8)


def _multiply_groups(
    nodes: FoldedNodes, codes: ir.Value, factors: NDArray[np.int8], group_sizes: Sequence[int]
) -> ir.Value:
    """Multiply int8 codes ``[c, n_out]`` by the factors of their groups of rows, ``[g, n_out]``."""
    stored = nodes.cast(nodes.stored("factors", factors), ir.DataType.INT32)
    groups, n_out = factors.shape
    if len(set(group_sizes)) == 1:  # which factor is a row's then need not be stored
        column = nodes.op("Unsqueeze", [stored, _vector(nodes, "one", 1)])
        grouped = nodes.stored("grouped", np.array([groups, group_sizes[0], n_out], np.int64))
        flat = nodes.stored("rows", np.array([-1, n_out], np.int64))
        of_code = nodes.op("Reshape", [nodes.op("Expand", [column, grouped]), flat])
    else:
        of_row = np.repeat(np.arange(groups, dtype=np.uint16), group_sizes)
        group = nodes.cast(nodes.stored("group", of_row), ir.DataType.INT32)
        of_code = nodes.op("Gather", [stored, group], {"axis": 0})
    wide = nodes.cast(codes, ir.DataType.INT32)
    return nodes.cast(nodes.op("Mul", [wide, of_code]), ir.DataType.INT8)


def _digits(nodes: FoldedNodes, codes: NDArray[np.int8]) -> ir.Value:
    """Write codes of three values, five to a byte, as digits to the base of 3."""
    rows = -(-codes.size // TRITS)
    padded = np.zeros(rows * TRITS, np.int32)
    padded[: codes.size] = codes.ravel().astype(np.int32) + 1
    powers = (3 ** np.arange(TRITS)).astype(np.int32)
    stored = nodes.stored("trits", (padded.reshape(rows, TRITS) @ powers).astype(np.uint8)[:, None])
    wide = nodes.cast(stored, ir.DataType.INT32)
    shifted = nodes.op("Div", [wide, _shared(nodes, "powers3", powers)])
    digits = nodes.op("Mod", [shifted, _shared(nodes, "base3", np.array(3, np.int32))])
    centered = nodes.op("Sub", [digits, _shared(nodes, "center3", np.array(1, np.int32))])
    whole = nodes.op("Reshape", [nodes.cast(centered, ir.DataType.INT8), _vector(nodes, "flat", -1)])
    if rows * TRITS > codes.size:
        whole = nodes.op("Slice", [whole, _vector(nodes, "zero", 0), _vector(nodes, "size", codes.size)])
    return nodes.op("Reshape", [whole, nodes.stored("shape", np.array(codes.shape, np.int64))])


def _sum_planes(nodes: FoldedNodes, codes: NDArray[np.int8], bits: int) -> ir.Value:
    offset = 1 << (bits - 1)
    unsigned = (codes.astype(np.int32) + offset).astype(np.uint8)
    total = _shared(nodes, f"offset{bits}", np.array(-offset, np.int32))
    return nodes.cast(sum_planes(nodes, unsigned, bits, total), ir.DataType.INT8)


def sum_planes(nodes: FoldedNodes, codes: NDArray[np.uint8], bits: int, total: ir.Value | None = None) -> ir.Value:
    """Store codes of ``bits`` bits, 1 to 7, in planes and write what widens them, int32 of the same shape, added to ``total``."""
    shift = 0
    for width in plane_widths(bits):
        values = (codes.ravel() >> shift) & ((1 << width) - 1)
        plane = _unpack(nodes, values, width, shift)
        total = plane if total is None else nodes.op("Add", [plane, total])
        shift += width
    assert total is not None
    return nodes.op("Reshape", [total, nodes.stored("shape", np.array(codes.shape, np.int64))])


def _unpack(nodes: FoldedNodes, values: NDArray[Any], width: int, shift: int) -> ir.Value:
    """Write one plane, int32 in its place of the code: a column of bytes, masked and shifted by rows of masks and distances."""
    per_byte = 8 // width
    rows = -(-len(values) // per_byte)
    padded = np.zeros(rows * per_byte, np.uint8)
    padded[: len(values)] = values
    distances = (np.arange(per_byte) * width).astype(np.uint8)
    packed = np.bitwise_or.reduce(padded.reshape(rows, per_byte) << distances, axis=1, dtype=np.uint8)
    stored = nodes.stored(f"plane{shift}", packed[:, None])
    # masked first: OpenVINO divides where it should shift, and rounds, so nothing may be left over
    masks = (((1 << width) - 1) << distances).astype(np.uint8)
    masked = nodes.op("BitwiseAnd", [stored, _shared(nodes, f"masks{width}", masks)])
    moved = nodes.op("BitShift", [masked, _shared(nodes, f"shifts{width}", distances)], {"direction": "RIGHT"})
    whole = nodes.op("Reshape", [moved, _vector(nodes, "flat", -1)])
    if rows * per_byte > len(values):
        whole = nodes.op("Slice", [whole, _vector(nodes, "zero", 0), _vector(nodes, "size", len(values))])
    wide = nodes.cast(whole, ir.DataType.INT32)
    if shift == 0:
        return wide
    return nodes.op("Mul", [wide, _shared(nodes, f"weight{shift}", np.array(1 << shift, np.int32))])


def _vector(nodes: FoldedNodes, name: str, value: int) -> ir.Value:
    return _shared(nodes, f"{name}_{value}", np.array([value], np.int64))


def _shared(nodes: FoldedNodes, name: str, value: NDArray[Any]) -> ir.Value:
    """Return a constant that all layers share."""
    return FoldedNodes(nodes.graph, "narrow").stored(name, value)
