"""Move the large tensors of a model into a second file where one of protobuf does not hold them.

A table of embeddings or float layers of more than 2 GB leave no other way. Tensors begin at whole pages, so that runtimes can
map the file into memory instead of reading it.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from kancompile.ir import EXTERNAL_SUFFIX, MOST_FILE_BYTES, external_tensors

LOCATION = "model.onnx" + EXTERNAL_SUFFIX
_ROOM = 64 << 20
"""Bytes for nodes, names and metadata."""
_SMALL, _PAGE = 1024, 4096
_PLAIN = (
    ir.DataType.FLOAT,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
)


def is_too_large(model: ir.Model) -> bool:
    """Say whether protobuf cannot hold a model with all its tensors."""
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    return sum(sizes) > MOST_FILE_BYTES - _ROOM


def move_out(model: ir.Model) -> memoryview:
    """Let tensors of 1 kB and more stand in a second file, in place; return its content."""
    moved: list[tuple[ir.Value, ir.TensorProtocol, int]] = []
    end = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _SMALL and tensor.dtype in _PLAIN:
            moved.append((value, tensor, end))
            end += -(-tensor.nbytes // _PAGE) * _PAGE
    content = np.zeros(end, np.uint8)
    for value, tensor, offset in moved:
        raw = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        content[offset : offset + len(raw)] = raw
        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.ExternalTensor(
            LOCATION, offset, len(raw), tensor.dtype, shape=shape, name=value.name or ""
        )
    return memoryview(content.data).toreadonly()


def for_the_checker(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph with tensors of the second file as inputs, since ONNX's checker would look for the file."""
    outside = external_tensors(proto)
    if not outside:
        return proto
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(proto)
    for tensor in outside:
        stand_in.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inside = [one for one in stand_in.graph.initializer if one.data_location != onnx.TensorProto.EXTERNAL]
    del stand_in.graph.initializer[:]
    stand_in.graph.initializer.extend(inside)
    return stand_in
