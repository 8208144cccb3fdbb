"""Store weight codes in as few bytes as their bits need, while they compute as int8.

A DequantizeLinear straight on a narrow tensor has no fused kernel. So narrow codes are stored apart from how they compute, and
the file says how the one becomes the other. ONNX Runtime folds these constant nodes when it loads the file; the product then
is the same integer kernel at the same speed::

    2 to 7 bits:  uint8 planes of 4, 2 and 1 bits, each holding 2, 4 or 8 codes in a byte
                  -> BitwiseAnd, BitShift, Cast; planes times their weights are summed -> minus the offset

Where groups of rows differ in scale by whole factors, the factors are stored beside the codes and multiplied in likewise.

That is opset 21 and loads in every ONNX Runtime from 1.20 on. ONNX has tensors of 4 bits, and from opset 25 on of 2, but ONNX
Runtime 1.20 has no Cast from int4, and nothing stores 3 bits in 3.

Tools that read ONNX tensors know types, not planes. ``storage="native"`` is for them: the narrowest type that holds the
codes, int2 (opset 25, ONNX Runtime from 1.24 on), int4 (ONNX Runtime from 1.22 on) or int8, with a Cast to int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kancompile.ir import GroupMultiplier

PLANE_BITS = (4, 2, 1)
INT2_OPSET, INT2_IR_VERSION = 25, 13


def stored_bytes(codes: int, bits: int) -> int:
    """Return what ``codes`` weight codes take in a file with ``storage="smallest"``."""
    if bits == 8:
        return codes
    return sum(-(-codes * width // 8) for width in plane_widths(bits))


def plane_widths(bits: int) -> list[int]:
    """Divide 2 to 7 bits into planes, widest first: 7 -> 4, 2, 1."""
    return [width for width in PLANE_BITS if bits & width]


@dataclass(frozen=True)
class NarrowWeights:
    """What a file stores in place of int8 weights.

    Attributes:
        bits: of the codes, 2 to 7.
        multiplier: factors of groups of rows, where the weights are codes times factors.
    """

    bits: int
    multiplier: GroupMultiplier | None = None


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
        writer = _Writer(model, name)
        widened = writer.cast(codes, stored) if native else writer.sum_planes(codes, bits)
        if factors is not None:
            widened = writer.multiply_groups(widened, factors.factors.numpy(), factors.group_sizes)
        uses = list(value.uses())
        first = next(node for node in model.graph if any(use.node is node for use in uses))
        model.graph.insert_before(first, writer.nodes)
        for use in uses:
            use.node.replace_input_with(use.idx, widened)
        del model.graph.initializers[name]
        if native and stored == ir.DataType.INT2:
            # every operator of the file means the same in opset 25, which adds types
            model.graph.opset_imports[""] = INT2_OPSET
            model.ir_version = INT2_IR_VERSION


class _Writer:
    """Builds the nodes that widen one initializer."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self.model, self.name = model, name
        self.nodes: list[ir.Node] = []

    def cast(self, codes: NDArray[np.int8], stored: ir.DataType) -> ir.Value:
        narrow = codes.astype(ml_dtypes.int2 if stored == ir.DataType.INT2 else ml_dtypes.int4)
        value = self._initializer(stored.name.lower(), ir.tensor(narrow, dtype=stored))
        return self._node("Cast", [value], {"to": int(ir.DataType.INT8)})

    def multiply_groups(self, codes: ir.Value, factors: NDArray[np.int8], group_sizes: Sequence[int]) -> ir.Value:
        """Multiply int8 codes ``[c, n_out]`` by the factors of their groups of rows, ``[g, n_out]``."""
        stored = self._node("Cast", [self._initializer("factors", ir.tensor(factors))], {"to": int(ir.DataType.INT32)})
        groups, n_out = factors.shape
        if len(set(group_sizes)) == 1:  # which factor is a row's then need not be stored
            column = self._node("Unsqueeze", [stored, self._vector("one", 1)])
            grouped = self._initializer("grouped", ir.tensor(np.array([groups, group_sizes[0], n_out], np.int64)))
            flat = self._initializer("rows", ir.tensor(np.array([-1, n_out], np.int64)))
            of_code = self._node("Reshape", [self._node("Expand", [column, grouped]), flat])
        else:
            of_row = np.repeat(np.arange(groups, dtype=np.uint16), group_sizes)
            group = self._node("Cast", [self._initializer("group", ir.tensor(of_row))], {"to": int(ir.DataType.INT32)})
            of_code = self._node("Gather", [stored, group], {"axis": 0})
        wide = self._node("Cast", [codes], {"to": int(ir.DataType.INT32)})
        return self._node("Cast", [self._node("Mul", [wide, of_code])], {"to": int(ir.DataType.INT8)})

    def sum_planes(self, codes: NDArray[np.int8], bits: int) -> ir.Value:
        offset = 1 << (bits - 1)
        total = self._constant(f"offset{bits}", np.array(-offset, np.int32))
        for plane in self._planes(codes, bits, offset):
            total = self._node("Add", [plane, total])
        shaped = self._node("Reshape", [total, self._initializer("shape", ir.tensor(np.array(codes.shape, np.int64)))])
        return self._node("Cast", [shaped], {"to": int(ir.DataType.INT8)})

    def _planes(self, codes: NDArray[np.int8], bits: int, offset: int) -> Iterator[ir.Value]:
        """Yield each plane as int32 values in their place of the code, one dimension of ``codes.size``."""
        unsigned = (codes.ravel().astype(np.int32) + offset).astype(np.uint8)
        shift = 0
        for width in plane_widths(bits):
            values = ((unsigned >> shift) & ((1 << width) - 1)).astype(np.uint8)
            yield self._unpack(values, width, shift)
            shift += width

    def _unpack(self, values: NDArray[np.uint8], width: int, shift: int) -> ir.Value:
        """Write one plane: a column of bytes, masked and shifted by rows of masks and distances, and flattened."""
        per_byte = 8 // width
        rows = -(-len(values) // per_byte)
        padded = np.zeros(rows * per_byte, np.uint8)
        padded[: len(values)] = values
        distances = (np.arange(per_byte) * width).astype(np.uint8)
        packed = np.bitwise_or.reduce(padded.reshape(rows, per_byte) << distances, axis=1, dtype=np.uint8)
        stored = self._initializer(f"plane{shift}", ir.tensor(packed[:, None]))
        # masked first: OpenVINO divides where it should shift, and rounds, so nothing may be left over
        masks = (((1 << width) - 1) << distances).astype(np.uint8)
        masked = self._node("BitwiseAnd", [stored, self._constant(f"masks{width}", masks)])
        moved = self._node("BitShift", [masked, self._constant(f"shifts{width}", distances)], {"direction": "RIGHT"})
        whole = self._node("Reshape", [moved, self._vector("flat", -1)])
        if rows * per_byte > len(values):
            whole = self._node("Slice", [whole, self._vector("zero", 0), self._vector("size", len(values))])
        wide = self._node("Cast", [whole], {"to": int(ir.DataType.INT32)})
        if shift == 0:
            return wide
        return self._node("Mul", [wide, self._constant(f"weight{shift}", np.array(1 << shift, np.int32))])

    def _vector(self, name: str, value: int) -> ir.Value:
        return self._constant(f"{name}_{value}", np.array([value], np.int64))

    def _initializer(self, suffix: str, tensor: ir.TensorProtocol) -> ir.Value:
        return self._named(f"{self.name}.{suffix}", tensor)

    def _named(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self.model.graph.initializers:
            value = ir.Value(
                name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.model.graph.initializers[name] = value
        return self.model.graph.initializers[name]

    def _constant(self, name: str, value: NDArray[np.generic]) -> ir.Value:
        """Return a constant that all layers share."""
        return self._named(f"narrow.{name}", ir.tensor(value))

    def _node(
        self, operator: str, inputs: list[ir.Value], attributes: Mapping[str, int | str] | None = None
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {})
        node.outputs[0].name = f"{self.name}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]
