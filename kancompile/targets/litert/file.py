"""Write ``.tflite`` files with the schema that ai-edge-litert brings, without TensorFlow.

A :class:`LiteRTFile` collects tensors and operators in order of execution. The first dimension of what depends on the input
is left open (-1), so a file runs with every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError

INSTALL = "pip install 'kancompile[litert]'"

# what a format reader checks against its own kernels; 1 unless the kernel learnt the type later
_VERSIONS = {
    ("BATCH_MATMUL", "int8"): 2,
    ("CONCATENATION", "int8"): 2,
    ("GATHER", "int8"): 2,
    ("PADV2", "int8"): 2,
    ("STRIDED_SLICE", "int8"): 2,
    ("TRANSPOSE", "int8"): 2,
}


@dataclass(frozen=True)
class Value:
    """A tensor of the file.

    Attributes:
        index: its number.
        shape: its shape, -1 for the open first dimension.
        dtype: ``"float32"``, ``"int32"`` or ``"int8"``.
    """

    index: int
    shape: tuple[int, ...]
    dtype: str


class LiteRTFile:
    """A file under construction, of one subgraph.

    Raises:
        KanCompileError: ai-edge-litert is not installed.
    """

    def __init__(self) -> None:
        try:
            from ai_edge_litert import schema_py_generated
        except ImportError as error:
            raise KanCompileError(
                f"target 'litert': found no ai-edge-litert, whose schema writes the file; install it: {INSTALL}"
            ) from error
        self.schema: Any = schema_py_generated
        self.graph = self.schema.SubGraphT()
        self.graph.name, self.graph.tensors, self.graph.operators = "main", [], []
        self.model = self.schema.ModelT()
        self.model.version, self.model.subgraphs, self.model.operatorCodes = 3, [self.graph], []
        self.model.buffers = [self.schema.BufferT()]  # number 0 is empty by definition
        self._codes: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], Value] = {}

    def input(self, shape: Sequence[int]) -> Value:
        """Add the float32 input ``[b, *shape]``."""
        value = self._tensor("input", (-1, *shape), "float32", 0)
        self.graph.inputs = np.array([value.index], np.int32)
        return value

    def constant(self, array: NDArray[Any], name: str = "constant") -> Value:
        """Add a constant; equal ones are stored once."""
        key = (array.tobytes(), array.dtype.name, array.shape)
        if key not in self._constants:
            buffer = self._buffer(array.tobytes())
            self._constants[key] = self._tensor(name, array.shape, array.dtype.name, buffer)
        return self._constants[key]

    def node(
        self,
        operator: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        dtype: str,
        options: str = "",
        name: str = "",
        **values: Any,
    ) -> Value:
        """Add an operator of one output.

        Args:
            operator: name in the schema's ``BuiltinOperator``.
            inputs: what it reads.
            shape, dtype: of its output.
            options: name in the schema's ``BuiltinOptions``, with their ``values``.
            name: of the output.
        """
        node = self.schema.OperatorT()
        node.opcodeIndex = self._code(operator, _VERSIONS.get((operator, inputs[0].dtype), 1))
        node.inputs = np.array([value.index for value in inputs], np.int32)
        output = self._tensor(name or operator.lower(), tuple(shape), dtype, 0)
        node.outputs = np.array([output.index], np.int32)
        if options:
            node.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            node.builtinOptions = getattr(self.schema, f"{options}T")()
            for key, value in values.items():
                assert hasattr(node.builtinOptions, key), key
                setattr(node.builtinOptions, key, value)
        self.graph.operators.append(node)
        return output

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """View ``x`` with another shape, of which one size may be -1."""
        if x.shape == tuple(shape):
            return x
        new_shape = np.array(shape, np.int32)
        return self.node("RESHAPE", [x, self.constant(new_shape)], shape, x.dtype, "ReshapeOptions", newShape=new_shape)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Reorder dimensions; the first stays."""
        shape = [x.shape[position] for position in order]
        return self.node("TRANSPOSE", [x, self.constant(np.array(order, np.int32))], shape, x.dtype, "TransposeOptions")

    def binary(self, operator: str, x: Value, y: Value) -> Value:
        """Add an elementwise operator of two inputs of one type, such as ``"ADD"``."""
        options = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions", "DIV": "DivOptions"}
        shape = _broadcast(x.shape, y.shape)
        return self.node(operator, [x, y], shape, x.dtype, options.get(operator, "MaximumMinimumOptions"))

    def unary(self, operator: str, x: Value) -> Value:
        """Add an elementwise operator without options."""
        return self.node(operator, [x], x.shape, x.dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        """Convert, truncating towards 0."""
        if x.dtype == dtype:
            return x
        source, result = self._type(x.dtype), self._type(dtype)
        return self.node("CAST", [x], x.shape, dtype, "CastOptions", inDataType=source, outDataType=result)

    def concatenate(self, parts: Sequence[Value], axis: int) -> Value:
        """Join along one dimension."""
        if len(parts) == 1:
            return parts[0]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.node("CONCATENATION", parts, shape, parts[0].dtype, "ConcatenationOptions", axis=axis)

    def slice(self, x: Value, begin: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> Value:
        """Take ``size`` elements from ``begin`` on in every dimension but the first, ``stride`` apart."""
        if all(first == 0 for first in begin) and tuple(size) == x.shape[1:]:
            return x
        end = [first + (count - 1) * step + 1 for first, count, step in zip(begin, size, stride, strict=True)]
        bounds = [self.constant(np.array([0, *edge], np.int32)) for edge in (begin, end)]
        steps = self.constant(np.array([1, *stride], np.int32))
        whole_batch = 1
        return self.node(
            "STRIDED_SLICE",
            [x, *bounds, steps],
            (x.shape[0], *size),
            x.dtype,
            "StridedSliceOptions",
            beginMask=whole_batch,
            endMask=whole_batch,
        )

    def finish(self, output: Value, metadata: Mapping[str, str]) -> bytes:
        """Name the output, add metadata and return the file; equal files have equal bytes."""
        import flatbuffers

        self.graph.tensors[output.index].name = "output"
        self.graph.outputs = np.array([output.index], np.int32)
        self.model.description = "kancompile"
        self.model.metadata = [self._entry(name, text) for name, text in metadata.items()]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _entry(self, name: str, text: str) -> Any:
        entry = self.schema.MetadataT()
        entry.name, entry.buffer = name, self._buffer(text.encode())
        return entry

    def _code(self, operator: str, version: int) -> int:
        if (operator, version) not in self._codes:
            code = self.schema.OperatorCodeT()
            code.builtinCode = getattr(self.schema.BuiltinOperator, operator)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            self.model.operatorCodes.append(code)
            self._codes[operator, version] = len(self.model.operatorCodes) - 1
        return self._codes[operator, version]

    def _buffer(self, data: bytes) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str, buffer: int) -> Value:
        tensor = self.schema.TensorT()
        tensor.name, tensor.buffer, tensor.type = name, buffer, self._type(dtype)
        tensor.shape = np.array([abs(size) for size in shape], np.int32)
        if -1 in shape:
            tensor.shapeSignature = np.array(shape, np.int32)
        self.graph.tensors.append(tensor)
        return Value(len(self.graph.tensors) - 1, tuple(shape), dtype)

    def _type(self, dtype: str) -> int:
        kind: int = getattr(self.schema.TensorType, dtype.upper())
        return kind


def _broadcast(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    """Broadcast shapes whose open dimension, if any, is the first of the longer one."""
    longer, shorter = (x, y) if len(x) >= len(y) else (y, x)
    padded = (*[1] * (len(longer) - len(shorter)), *shorter)
    return tuple(-1 if -1 in pair else max(pair) for pair in zip(longer, padded, strict=True))


def columns_of(shape: Sequence[int], dimensions: int) -> int:
    """Multiply the sizes of the last dimensions."""
    return math.prod(shape[len(shape) - dimensions :])
