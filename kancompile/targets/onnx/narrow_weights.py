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

Tables that take fewer bits as differences of their rows (``ir.smooth_codes``) are stored as these, and summed up likewise.

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

from kancompile.ir import TRITS, GroupMultiplier, SmoothCodes
from kancompile.targets.onnx.folded_nodes import FoldedNodes

PLANE_BITS = (4, 2, 1)
INT2_OPSET, INT2_IR_VERSION = 25, 13
SHARED_BY, OTHERS, _MOST_NAMED = "+", "others", 3


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
        smooth: the differences that are stored of a table, which sums give back.
    """

    bits: int
    multiplier: GroupMultiplier | None = None
    trits: bool = False
    smooth: SmoothCodes | None = None


def native_type(bits: int) -> ir.DataType:
    """Return the narrowest ONNX type that holds codes of 2 to 8 bits."""
    return ir.DataType.INT2 if bits == 2 else ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8


def store_narrow_weights(model: ir.Model, narrow: Mapping[str, NarrowWeights], native: bool = False) -> None:
    """Exchange int8 initializers for narrow ones and the nodes that widen them, in place.

    Planes of 4, 2 and 1 bits hold the codes of all layers and widths, so that a file has the nodes that unpack them once.

    Args:
        model: the model; its opset is raised to 25 where it gets an int2 tensor.
        narrow: name of an initializer to what is stored in its place. One that the exporter merged with an equal one is
            stored with that.
        native: use tensors of the narrowest type that holds the codes, never planes.
    """
    found = {name: weights for name, weights in narrow.items() if _codes(model, name, weights) is not None}
    if native:
        for name, weights in found.items():
            _store_native(model, name, weights)
        return
    kinds = dict.fromkeys((weights.bits, weights.trits) for weights in found.values())
    joined = {
        (bits, trits): _Joined(
            model, {name: one for name, one in found.items() if (one.bits, one.trits) == (bits, trits)}
        )
        for bits, trits in kinds
    }
    _widen(model, joined)


def _codes(model: ir.Model, name: str, weights: NarrowWeights) -> NDArray[np.int8] | None:
    """Give the codes of an initializer, factors of groups taken out; ``None`` where there is none of that name."""
    value = model.graph.initializers.get(name)
    if value is None:
        return None
    if weights.smooth is not None:
        return weights.smooth.differences
    assert value.const_value is not None
    codes: NDArray[np.int8] = value.const_value.numpy()
    return codes if weights.multiplier is None else codes // weights.multiplier.of_column().numpy()


def _store_native(model: ir.Model, name: str, weights: NarrowWeights) -> None:
    stored = native_type(weights.bits)
    if stored == ir.DataType.INT8:
        return
    codes, nodes = _codes(model, name, weights), FoldedNodes(model.graph, name)
    assert codes is not None
    _replace(model, name, weights, _cast(nodes, codes, stored))
    if stored == ir.DataType.INT2:
        # every operator of the file means the same in opset 25, which adds types
        model.graph.opset_imports[""] = INT2_OPSET
        model.ir_version = INT2_IR_VERSION


class _Joined:
    """Codes of one width, one behind the other; widened, they are split again, by layers and then by groups of rows."""

    def __init__(self, model: ir.Model, narrow: Mapping[str, NarrowWeights]) -> None:
        self.model, self.narrow = model, narrow
        self.blocks: dict[str, list[str]] = {}  # initializers of a layer, which have as many columns
        for name in narrow:
            self.blocks.setdefault(name.rpartition(".")[0], []).append(name)
        self.codes = {name: array for name, one in narrow.items() if (array := _codes(model, name, one)) is not None}
        self.flat = np.concatenate([self.codes[name].ravel() for names in self.blocks.values() for name in names])

    def replace(self, nodes: FoldedNodes, wide: ir.Value) -> None:
        """Let all nodes read the widened codes, int8 ``[n]``."""
        sizes = [sum(self.codes[name].size for name in names) for names in self.blocks.values()]
        for names, part in zip(self.blocks.values(), _split(nodes, wide, sizes), strict=True):
            matrix = nodes.op("Reshape", [part, nodes.shape(-1, *self.codes[names[0]].shape[1:])])
            rows = [len(self.codes[name]) for name in names]
            for name, group in zip(names, _split(nodes, matrix, rows), strict=True):
                _replace(self.model, name, self.narrow[name], group)


def _widen(model: ir.Model, joined: Mapping[tuple[int, bool], _Joined]) -> None:
    """Write the nodes that widen codes of all widths: planes of 4, of 2 and of 1 bits are unpacked once, whoever reads them."""

    def nodes_for(ones: Sequence[_Joined]) -> FoldedNodes:
        return FoldedNodes(model.graph, _owners([block for one in ones for block in one.blocks]))

    found: dict[int, list[ir.Value]] = {}
    for width in PLANE_BITS:
        readers = {bits: one for (bits, trits), one in joined.items() if bits & width and not trits}
        if not readers:
            continue
        nodes = nodes_for(list(readers.values()))
        planes = [_plane((one.flat.astype(np.int32) + (1 << (bits - 1))), bits, width) for bits, one in readers.items()]
        whole = _unpack(nodes, np.concatenate(planes), width)
        parts = _split(nodes, whole, [len(plane) for plane in planes])
        for bits, part in zip(readers, parts, strict=True):
            found.setdefault(bits, []).append(_in_place(nodes, part, _shift_of(bits, width)))
    for (bits, trits), one in joined.items():
        nodes = nodes_for([one])
        if trits:
            wide = _digits(nodes, one.flat)
        else:
            total = _shared(nodes, f"offset{bits}", np.array(-(1 << (bits - 1)), np.int32))
            for plane in found[bits]:
                total = nodes.op("Add", [plane, total])
            wide = nodes.cast(total, ir.DataType.INT8)
        one.replace(nodes, wide)


def _owners(blocks: Sequence[str]) -> str:
    """Call a constant after the modules that share it."""
    modules = list(dict.fromkeys(block.partition(".")[0] for block in blocks))
    return SHARED_BY.join(modules if len(modules) <= _MOST_NAMED else [modules[0], OTHERS])


def _split(nodes: FoldedNodes, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    if len(sizes) == 1:
        return [value]
    parts: Sequence[ir.Value] = nodes.op_multi_out("Split", [value, nodes.shape(*sizes)], num_outputs=len(sizes))
    return parts


def _replace(model: ir.Model, name: str, weights: NarrowWeights, widened: ir.Value) -> None:
    factors, nodes = weights.multiplier, FoldedNodes(model.graph, name)
    if weights.smooth is not None:
        widened = _summed(nodes, widened, weights.smooth)
    if factors is not None:
        widened = _multiply_groups(nodes, widened, factors.factors.numpy(), factors.group_sizes)
    widened.name = f"{name}.codes"
    model.graph.initializers[name].replace_all_uses_with(widened)


def _summed(nodes: FoldedNodes, differences: ir.Value, smooth: SmoothCodes) -> ir.Value:
    """Add up differences of rows, int8, to the table, uint8."""
    found, axis = nodes.cast(differences, ir.DataType.INT32), _shared(nodes, "rows", np.array(0, np.int32))
    for order in range(smooth.order - 1, -1, -1):
        first = nodes.stored(f"first{order}", smooth.first[order][None])
        found = nodes.op("CumSum", [nodes.op("Concat", [first, found], {"axis": 0}), axis])
    return nodes.cast(found, ir.DataType.UINT8)


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
    """Write codes of three values, five to a byte, as digits to the base of 3; widened they are int8 ``[n]``."""
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
    return whole


def sum_planes(nodes: FoldedNodes, codes: NDArray[np.uint8], bits: int) -> ir.Value:
    """Store codes of ``bits`` bits, 1 to 7, in planes and write what widens them, int32 of the same shape."""
    total: ir.Value | None = None
    for width in plane_widths(bits):
        plane = _in_place(nodes, _unpack(nodes, _plane(codes, bits, width), width), _shift_of(bits, width))
        total = plane if total is None else nodes.op("Add", [plane, total])
    assert total is not None
    return (
        total
        if codes.ndim == 1
        else nodes.op("Reshape", [total, nodes.stored("shape", np.array(codes.shape, np.int64))])
    )


def _shift_of(bits: int, width: int) -> int:
    """Give the place in a code at which its plane of a width begins: the widest are the lowest bits."""
    return sum(other for other in plane_widths(bits) if other > width)


def _plane(codes: NDArray[Any], bits: int, width: int) -> NDArray[Any]:
    """Take the bits of a plane out of codes that are not negative, ``[n]``."""
    return (codes.ravel() >> _shift_of(bits, width)) & ((1 << width) - 1)


def _in_place(nodes: FoldedNodes, plane: ir.Value, shift: int) -> ir.Value:
    """Move the bits of a plane to where they stand in a code."""
    return (
        plane
        if shift == 0
        else nodes.op("Mul", [plane, _shared(nodes, f"weight{shift}", np.array(1 << shift, np.int32))])
    )


def _unpack(nodes: FoldedNodes, values: NDArray[Any], width: int) -> ir.Value:
    """Write one plane, int32: a column of bytes, masked and shifted by rows of masks and distances."""
    per_byte = 8 // width
    rows = -(-len(values) // per_byte)
    padded = np.zeros(rows * per_byte, np.uint8)
    padded[: len(values)] = values
    distances = (np.arange(per_byte) * width).astype(np.uint8)
    packed = np.bitwise_or.reduce(padded.reshape(rows, per_byte) << distances, axis=1, dtype=np.uint8)
    stored = nodes.stored(f"plane{width}", packed[:, None])
    # masked first: OpenVINO divides where it should shift, and rounds, so nothing may be left over
    masks = (((1 << width) - 1) << distances).astype(np.uint8)
    masked = nodes.op("BitwiseAnd", [stored, _shared(nodes, f"masks{width}", masks)])
    moved = nodes.op("BitShift", [masked, _shared(nodes, f"shifts{width}", distances)], {"direction": "RIGHT"})
    whole = nodes.op("Reshape", [moved, _vector(nodes, "flat", -1)])
    if rows * per_byte > len(values):
        whole = nodes.op("Slice", [whole, _vector(nodes, "zero", 0), _vector(nodes, "size", len(values))])
    return nodes.cast(whole, ir.DataType.INT32)


def _vector(nodes: FoldedNodes, name: str, value: int) -> ir.Value:
    return _shared(nodes, f"{name}_{value}", np.array([value], np.int64))


def _shared(nodes: FoldedNodes, name: str, value: NDArray[Any]) -> ir.Value:
    """Return a constant that all layers share."""
    return FoldedNodes(nodes.graph, "narrow").stored(name, value)
