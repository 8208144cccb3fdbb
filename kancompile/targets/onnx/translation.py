"""How the custom operators are written in standard ONNX (opset 21), in the forms that ONNX Runtime fuses.

Each function receives graph values and plain Python numbers and returns a graph value, as ``torch.onnx.export`` asks
of its ``custom_translation_table``. Facts behind the forms, each checked by the kernel audit:

* ``Gemm`` between DequantizeLinear nodes with an int32 bias becomes QGemm, with a float or a uint8 output. It does so
  only where the weight's DequantizeLinear names its zero point.
* A table must be gathered as integers: ``DequantizeLinear -> Gather`` would dequantize the whole table on every call.
* The activation's scale is 1 because column scales are folded into the weights; products with 1 are exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

import kancompile.ir  # noqa: F401  (registers the operators named below)

_PAIR_BLOCK = 64
JOINT_LOOKUP, COLUMN_LOOKUP = "JointLookup", "ColumnLookup"
STAND_INS = "kancompile"
"""The domain of operators that are written later."""
Value = Any  # an onnx_ir.Value while the exporter traces


def constant(value: np.ndarray[Any, Any]) -> Value:
    """Write a constant."""
    tensor: Any = ir.tensor(value)
    return op.Constant(value=tensor)


def quantize_index(x: Value, scale: float, zero_point: int, levels: int) -> Value:
    """QuantizeLinear saturates at 255 or 65535; fewer levels need a Clip of their own."""
    step = constant(np.array(scale, np.float32))
    if levels <= 256:
        return clip_codes(op.QuantizeLinear(x, step, constant(np.array(zero_point, np.uint8))), levels)
    codes = op.QuantizeLinear(x, step, constant(np.array(zero_point, np.uint16)))
    last = constant(np.array(levels - 1, np.int32))
    return op.Min(op.Cast(codes, to=ir.DataType.INT32), last)


def clip_codes(codes: Value, levels: int) -> Value:
    """Saturate uint8 codes at ``levels - 1``."""
    if levels == 256:
        return codes
    return op.Clip(codes, constant(np.array(0, np.uint8)), constant(np.array(levels - 1, np.uint8)))


_PRODUCTS = ("Gemm", "MatMul", "Conv", "Add")


def floor_index(x: Value, multiplier: float, offset: float, levels: int) -> Value:
    """Mul, Add, Clip, Cast; without Mul and Add, Cast and then Clip.

    A Clip right behind a Gemm would keep ONNX Runtime from making an integer kernel of it. Values already in units of
    rows are integer sums times a scale below 1, so they fit the int32 that they are cast to first. What is no sum of products, as
    where a layer that is used again reads the input of the network, may be NaN, which a Max turns into row 0.
    """
    producer = x.producer()
    is_finite = producer is not None and producer.op_type in _PRODUCTS
    if multiplier == 1.0 and offset == 0.0:
        rows = op.Cast(x, to=ir.DataType.INT32)
        return op.Clip(rows, constant(np.array(0, np.int32)), constant(np.array(levels - 1, np.int32)))
    x = op.Add(op.Mul(x, constant(np.array(multiplier, np.float32))), constant(np.array(offset, np.float32)))
    clipped = op.Clip(x, constant(np.array(0, np.float32)), constant(np.array(levels - 1, np.float32)))
    rows = op.Cast(clipped, to=ir.DataType.INT32)
    return rows if is_finite else op.Max(rows, constant(np.array(0, np.int32)))


def expand(index: Value, table: Value, first_row: Value | None) -> Value:
    """Gather rows of raw uint8 codes."""
    rows = index if index.dtype == ir.DataType.INT32 else op.Cast(index, to=ir.DataType.INT32)
    if first_row is not None:
        rows = op.Add(rows, first_row)
    gathered: Value = op.Gather(table, rows, axis=0)  # type: ignore[type-var]
    return gathered


def expand_pairs(index: Value, table: Value) -> Value:
    """Join neighboring row numbers to one, ``L * even + odd``, and gather from a table of all pairs of rows.

    Gather takes as long for a row of 10 bytes as for one of 5, about 4 ns, and the product that joins the numbers, done by
    the integer matrix kernel, a tenth of that. What stands here gathers from the table itself;
    ``pair_tables.build_pair_tables`` puts the table of pairs in its place, out of reach of the exporter's constant folding.
    """
    rows, k = (int(size) for size in table.shape)
    lead, n_in = [int(size) for size in index.shape[1:-1]], int(index.shape[-1])
    block = max(size for size in range(2, _PAIR_BLOCK + 1, 2) if n_in % size == 0)
    join = np.zeros((block, block // 2), np.uint8)
    join[np.arange(0, block, 2), np.arange(block // 2)] = rows
    join[np.arange(1, block, 2), np.arange(block // 2)] = 1
    flat = op.Reshape(index, constant(np.array([-1, block], np.int64)))
    pairs = op.MatMulInteger(flat, constant(join))
    return op.Reshape(op.Gather(table, pairs, axis=0), constant(np.array([-1, *lead, n_in, k], np.int64)))


def contract(
    features: Sequence[Value],
    weights: Sequence[Value],
    bias: Value,
    scales: Sequence[Value],
    weight_bits: int,
) -> Value:
    """One integer product for each scale group, added by Sum.

    An Add behind a MatMul, or a Sum behind a Gemm without bias, would be fused into a float Gemm before the integer
    fusions run; a Sum behind a MatMul and a Gemm with bias is left alone.
    """
    if len(weights) == 1:
        return _regroup(_gemm(_columns(features), weights[0], bias, scales[0]), features[0], weights[0])
    columns = _group_columns(features, [int(weight.shape[0]) for weight in weights])
    parts = [_gemm(columns[0], weights[0], bias, scales[0])]
    for column, weight, scale in zip(columns[1:], weights[1:], scales[1:], strict=True):
        parts.append(op.MatMul(_activation(column), _real_weight(weight, scale)))
    return _regroup(op.Sum(*parts), features[0], weights[0])


def contract_to_index(
    features: Sequence[Value],
    weight: Value,
    bias: Value,
    scale: Value,
    out_scale: float,
    out_zero_point: int,
    out_levels: int,
    weight_bits: int,
) -> Value:
    """Gemm with QuantizeLinear behind it: one QGemm with a uint8 output."""
    y = _gemm(_columns(features), weight, bias, scale)
    codes = op.QuantizeLinear(
        y, constant(np.array(out_scale, np.float32)), constant(np.array(out_zero_point, np.uint8))
    )
    return _regroup(clip_codes(codes, out_levels), features[0], weight)


def _columns(features: Sequence[Value]) -> Value:
    flat = [_flatten(feature) for feature in features]
    return flat[0] if len(flat) == 1 else op.Concat(*flat, axis=1)


def _flatten(feature: Value) -> Value:
    """View ``[b, *, n_in, k]`` as the matrix ``[b *, n_in k]`` that integer Gemm kernels need."""
    columns = int(feature.shape[-2]) * int(feature.shape[-1])
    return op.Reshape(feature, constant(np.array([-1, columns], np.int64)))


def _group_columns(features: Sequence[Value], group_sizes: Sequence[int]) -> Sequence[Value]:
    sizes = [int(feature.shape[-2]) * int(feature.shape[-1]) for feature in features]
    if sizes == list(group_sizes):
        return [_flatten(feature) for feature in features]
    columns = _columns(features)
    bounds = [0, *itertools.accumulate(group_sizes)]
    axis = constant(np.array([1], np.int64))
    return [
        op.Slice(columns, constant(np.array([start], np.int64)), constant(np.array([end], np.int64)), axis)
        for start, end in itertools.pairwise(bounds)
    ]


def _activation(columns: Value) -> Value:
    return op.DequantizeLinear(columns, constant(np.array(1, np.float32)), constant(np.array(0, np.uint8)))


def _real_weight(weight: Value, scale: Value) -> Value:
    zero_point = np.zeros(int(weight.shape[1]), np.int8)
    return op.DequantizeLinear(weight, scale, constant(zero_point), axis=1)


def _gemm(columns: Value, weight: Value, bias: Value, scale: Value) -> Value:
    real_bias = op.DequantizeLinear(bias, scale, axis=0)
    return op.Gemm(_activation(columns), _real_weight(weight, scale), real_bias)


def _regroup(y: Value, feature: Value, weight: Value) -> Value:
    lead = [int(size) for size in feature.shape[1:-2]]
    if not lead:
        return y
    return op.Reshape(y, constant(np.array([-1, *lead, int(weight.shape[1])], np.int64)))


def view_of(x: Value) -> Value:
    """Name a value once more: what the exporter leaves of a squeeze of the batch dimension, and does not know itself."""
    return op.Identity(x)


def _stand_in(name: str, *parts: tuple[str, str]) -> Op:
    form = onnx.defs.OpSchema.FormalParameter
    inputs = [form("index", "rows"), *itertools.starmap(form, parts)]
    rows = [("rows", ["tensor(uint8)", "tensor(int32)"], "row numbers")]
    columns = [form("columns", "tensor(uint8)")]
    schema = onnx.defs.OpSchema(name, STAND_INS, 1, inputs=inputs, outputs=columns, type_constraints=rows)
    return Op(Opset(STAND_INS, 1), name, schema)


_MEMBERS = ("members", "tensor(int64)")
_OF_PARTS = _stand_in(f"{JOINT_LOOKUP}1", _MEMBERS, ("parts", "tensor(uint8)"))
_OF_BASIS = _stand_in(
    f"{JOINT_LOOKUP}4",
    _MEMBERS,
    ("basis", "tensor(uint8)"),
    ("mix", "tensor(int8)"),
    ("bias", "tensor(int16)"),
    ("shift", "tensor(uint8)"),
)
_OF_COLUMNS = _stand_in(COLUMN_LOOKUP, ("table", "tensor(uint8)"), ("group", "tensor(int64)"))


def expand_joint(index: Value, members: Value, parts: Value) -> Value:
    """Stand in for lookups of pairs of inputs; ``joint_tables`` writes them, out of the exporter's reach."""
    return _OF_PARTS(index, members, parts)


def expand_joint_of_basis(index: Value, members: Value, basis: Value, mix: Value, bias: Value, shift: Value) -> Value:
    """Stand in as well, for parts that are made when the file is loaded."""
    return _OF_BASIS(index, members, basis, mix, bias, shift)


def expand_columns(index: Value, table: Value, group: Value) -> Value:
    """Stand in for lookups column by column; ``column_tables`` writes them, out of reach as well."""
    return _OF_COLUMNS(index, table, group)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.prims.view_of.default: view_of,
    torch.ops.kancompile.quantize_index.default: quantize_index,
    torch.ops.kancompile.floor_index.default: floor_index,
    torch.ops.kancompile.expand.default: expand,
    torch.ops.kancompile.expand_pairs.default: expand_pairs,
    torch.ops.kancompile.expand_columns.default: expand_columns,
    torch.ops.kancompile.expand_joint.default: expand_joint,
    torch.ops.kancompile.expand_joint_of_basis.default: expand_joint_of_basis,
    torch.ops.kancompile.contract.default: contract,
    torch.ops.kancompile.contract_to_index.default: contract_to_index,
}
