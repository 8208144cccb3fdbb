"""Target ``litert``: a ``.tflite`` file whose integer layers equal the simulation bit for bit.

TensorFlow Lite's own quantized operators requantize with fixed-point multipliers and round ties away from zero, which is
off by a step now and then. The operators used here have no such freedom::

    product           BATCH_MATMUL int8 x int8 -> int32, then ADD of an int32 bias
    real values       CAST to float32, MUL by the scale
    row numbers       MUL or DIV, MAXIMUM, MINIMUM, ROUND (half to even), ADD of the zero point, CAST to int32
    table             GATHER of int8 codes; the bias takes up the shift from uint8
    convolution       PADV2 and STRIDED_SLICE bring the pixels under the kernel side by side; then it is a product

Clipping before rounding gives the same row and keeps infinite inputs away from the CAST. Images are channels last between
layers. Weights of all widths are stored as int8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from kancompile.errors import KanCompileError
from kancompile.ir import (
    AnyContraction,
    AnyExpansion,
    Geometry,
    IndexQuantizer,
    IntegerContraction,
    Program,
    TableExpansion,
    attribute,
)
from kancompile.targets.contract import Target
from kancompile.targets.litert.aten import ATEN
from kancompile.targets.litert.file import LiteRTFile, Value, columns_of

_SHIFT = 128  # uint8 codes become int8
_INT32_MAX = (1 << 31) - 1


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest", batch: int | None = None) -> bytes:
    """Write a program as a serialized LiteRT model."""
    _check(program)
    emitter = _Emitter(program)
    return emitter.file.finish(emitter.run(), metadata)


def _check(program: Program) -> None:
    for layer in program.layers():
        contraction = program.contraction(layer)
        if not isinstance(contraction, IntegerContraction):
            raise KanCompileError(
                f"layer {layer.name!r}: target 'litert' has integer layers only, found {type(contraction).__name__}; use a "
                'recipe with precision = "int8" and lowering = "table", or target ort-cpu'
            )
        contraction.verify_finished()


class _Emitter:
    """Visits nodes by methods of the names of their ``op``, as ``fx.Interpreter`` does.

    What a node became stands in ``values``, images also channels last in ``last``.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.file = LiteRTFile()
        self.values: dict[fx.Node, Any] = {}
        self.last: dict[fx.Node, Value] = {}
        self.shapes = _Shapes(program)

    def run(self) -> Value:
        """Emit all nodes and return the output."""
        for node in self.program.graph_module.graph.nodes:
            found = getattr(self, node.op)(node)
            if node not in self.last:
                self.values[node] = found
        output: Value = found
        return output

    def value(self, node: fx.Node) -> Any:
        """Return a node's value, an image channels first."""
        if node not in self.values:
            image = self.last[node]
            rank = len(image.shape)
            self.values[node] = self.file.transpose(image, [0, rank - 1, *range(1, rank - 1)])
        return self.values[node]

    def placeholder(self, node: fx.Node) -> Value:
        return self.file.input(self.program.input_shape)

    def get_attr(self, node: fx.Node) -> Any:
        return attribute(self.program.graph_module, str(node.target))

    def output(self, node: fx.Node) -> Value:
        sources = node.all_input_nodes
        if len(sources) != 1:
            raise KanCompileError(
                f"target 'litert': found {len(sources)} outputs, expected one; wrap the model to return one"
            )
        return self.file.cast(self.value(sources[0]), "float32")

    def call_function(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.value(source))
        if not any(isinstance(self.values.get(source), Value) for source in node.all_input_nodes):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target is torch.ops.aten.sym_size.int:
            return -1
        emit = ATEN.get(node.target)
        result = None if emit is None else emit(self.file, self.shapes.of(node), *args, **kwargs)
        if result is None:
            raise KanCompileError(
                f"target 'litert': operator {node.target!s} ({node.name}) outside the KAN layers has no form here; replace "
                "it in the model, compile the part without it, or use target ort-cpu"
            )
        return result

    def call_module(self, node: fx.Node) -> Value:
        module = self.program.module(str(node.target))
        visit = next((visit for kind, visit in _MODULES.items() if isinstance(module, kind)), None)
        if visit is None:
            kind = type(module).__name__
            known = isinstance(module, AnyContraction | AnyExpansion)
            raise KanCompileError(
                f"target 'litert': found {kind} {str(node.target)!r}, expected integer tables and layers; use a recipe with "
                + ('precision = "int8" and lowering = "table"' if known else "target ort-cpu")
            )
        return visit(self, node, module)

    def _layer(self, node: fx.Node, module: IntegerContraction) -> Value:
        features = [self.value(source) for source in node.all_input_nodes]
        if module.geometry is None:
            return self._contraction(features, module)
        self.last[node] = self._convolution(features, module, module.geometry)
        return self.last[node]

    def _table(self, node: fx.Node, module: TableExpansion) -> Value:
        file, source = self.file, node.all_input_nodes[0]
        if module.channels_first and source in self.last:
            x = self.last[source]
        else:
            x = self.value(source)
            if module.channels_first:
                x = file.transpose(x, [0, *range(2, len(x.shape)), 1])
            else:
                x = file.reshape(x, (-1, *module.read_shape))
        rows = x if module.input == "index" else self._rows(x, module)
        if module.picks is not None:
            picks = file.constant(module.picks.to(torch.int32).numpy())
            rows = file.node("GATHER", [rows, picks], (-1, *module.in_shape), rows.dtype, "GatherOptions", axis=1)
        if module.first_row is not None:
            rows = file.binary("ADD", rows, file.constant(module.first_row.to(torch.int32).numpy()))
        codes = (module.table.to(torch.int16) - _SHIFT).to(torch.int8).numpy()
        table = file.constant(codes, f"{node.target}.table")
        return file.node("GATHER", [table, rows], (*rows.shape, module.k), "int8", "GatherOptions", axis=0)

    def _rows(self, x: Value, module: TableExpansion) -> Value:
        index = module.index
        if module.input == "real":
            return self._quantize(self.file.binary("DIV", x, self._scalar(index.scale)), index)
        if module.input == "float":
            multiplier, offset = index.to_rows()
            x = self.file.binary("MUL", x, self._scalar(multiplier))
            x = self.file.binary("ADD", x, self._scalar(offset))
        return self.file.cast(self._clip(x, 0, index.levels - 1), "int32")

    def _quantize(self, scaled: Value, index: IndexQuantizer, real: bool = False) -> Value:
        """Round values in units of rows; give int32 row numbers, or the real values they stand for."""
        clipped = self._clip(scaled, -index.zero_point, index.levels - 1 - index.zero_point)
        rounded = self.file.unary("ROUND", clipped)
        if real:
            return self.file.binary("MUL", rounded, self._scalar(index.scale))
        return self.file.cast(self.file.binary("ADD", rounded, self._scalar(index.zero_point)), "int32")

    def _clip(self, x: Value, low: float, high: float) -> Value:
        at_least = self.file.binary("MAXIMUM", x, self._scalar(low))
        return self.file.binary("MINIMUM", at_least, self._scalar(high))

    def _scalar(self, value: float) -> Value:
        return self.file.constant(np.array(value, np.float32))

    def _contraction(self, features: Sequence[Value], module: IntegerContraction) -> Value:
        file = self.file
        flat = [file.reshape(feature, (-1, columns_of(feature.shape, 2))) for feature in features]
        columns = file.concatenate(flat, 1)
        bounds = [0, *itertools.accumulate(module.group_sizes)]
        total: Value | None = None
        for group, (weight, scale) in enumerate(zip(module.weights, module.scales, strict=True)):
            part = file.slice(columns, [bounds[group]], [module.group_sizes[group]], [1])
            bias = module.bias if group == 0 else torch.zeros_like(module.bias)
            sums = self._product(part, weight.T.numpy(), bias, module.layer, 0)
            if module.output is not None:
                return self._hand_over(sums, scale, module.output, (-1, *module.out_shape))
            real = file.binary("MUL", file.cast(sums, "float32"), file.constant(scale.numpy()))
            total = real if total is None else file.binary("ADD", total, real)
        assert total is not None
        return file.reshape(total, (-1, *module.out_shape))

    def _product(self, columns: Value, weight: NDArray[np.int8], bias: Tensor, layer: str, zero_point: int) -> Value:
        """Multiply int8 codes ``[m, c]`` by ``weight [n, c]``: int32 ``[m, n]``, as if codes were uint8 less ``zero_point``."""
        total = bias.numpy().astype(np.int64) + (_SHIFT - zero_point) * weight.astype(np.int64).sum(1)
        largest = _SHIFT * np.abs(weight.astype(np.int64)).sum(1).max() + np.abs(total).max()
        if largest > _INT32_MAX:
            raise KanCompileError(
                f"layer {layer!r}: integer sums can reach {largest}, expected at most {_INT32_MAX}; use fewer inputs or "
                "weight bits in this layer"
            )
        file, lead = self.file, columns.shape[:-1]
        weights = file.constant(np.ascontiguousarray(weight), f"{layer}.weight")
        shape, options = (*lead, len(weight)), {"adjX": False, "adjY": True, "asymmetricQuantizeInputs": False}
        sums = file.node("BATCH_MATMUL", [columns, weights], shape, "int32", "BatchMatMulOptions", layer, **options)
        return file.binary("ADD", sums, file.constant(total.astype(np.int32), f"{layer}.bias"))

    def _hand_over(
        self, sums: Value, scale: Tensor, output: IndexQuantizer, shape: Sequence[int], real: bool = False
    ) -> Value:
        multiplier = (scale / torch.tensor(output.scale, dtype=torch.float32)).numpy()
        scaled = self.file.binary("MUL", self.file.cast(sums, "float32"), self.file.constant(multiplier))
        return self.file.reshape(self._quantize(scaled, output, real), shape)

    def _convolution(self, features: Sequence[Value], module: IntegerContraction, geometry: Geometry) -> Value:
        file, codes = self.file, module.matrix
        assert module.output is not None
        lead = features[0].shape[:-2]
        pixels = self._pad(self._join(features, geometry.groups), geometry.padding, module.zero_point)
        out = module.out_shape[1:]
        group_columns, group_outputs = codes.shape[1], module.n_out // geometry.groups
        sums = []
        for group in range(geometry.groups):
            taps = []
            for tap in itertools.product(*map(range, module.kernel)):
                begin = [at * hold for at, hold in zip(tap, geometry.dilation, strict=True)]
                begin, size = [*begin, group * group_columns], [*out, group_columns]
                taps.append(file.slice(pixels, begin, size, [*geometry.stride, 1]))
            columns = file.concatenate(taps, len(lead))
            flat = file.reshape(columns, (-1, columns.shape[-1]))
            outputs = slice(group * group_outputs, (group + 1) * group_outputs)
            weight = codes[outputs].movedim(1, -1).flatten(1).numpy()
            sums.append(self._product(flat, weight, module.bias[outputs], module.layer, module.zero_point))
        shape = (-1, *out, module.n_out)
        real = module.hands_over.kind == "real"
        return self._hand_over(file.concatenate(sums, 1), module.scales[0], module.output, shape, real)

    def _join(self, features: Sequence[Value], groups: int) -> Value:
        """Put the columns of all features ``[b, *, n_in, k]`` side by side, ``[b, *, c]``, group by group."""
        lead = features[0].shape[:-2]
        if groups == 1 or len(features) == 1:
            flat = [self.file.reshape(x, (*lead, columns_of(x.shape, 2))) for x in features]
            return self.file.concatenate(flat, len(lead))
        parts = [self.file.reshape(x, (-1, groups, columns_of(x.shape, 2) // groups)) for x in features]
        joined = self.file.concatenate(parts, 2)
        return self.file.reshape(joined, (*lead, groups * joined.shape[-1]))

    def _pad(self, pixels: Value, padding: Sequence[int], zero_point: int) -> Value:
        if not any(padding):
            return pixels
        around = np.array([[0, 0], *[[pad, pad] for pad in padding], [0, 0]], np.int32)
        shape = [-1, *[size + 2 * pad for size, pad in zip(pixels.shape[1:-1], padding, strict=True)], pixels.shape[-1]]
        zero = self.file.constant(np.array(zero_point - _SHIFT, np.int8))
        return self.file.node("PADV2", [pixels, self.file.constant(around), zero], shape, "int8", "PadV2Options")


_MODULES: dict[type[nn.Module], Callable[..., Value]] = {
    TableExpansion: _Emitter._table,
    IntegerContraction: _Emitter._layer,
}


class _Shapes(fx.Interpreter):
    """Output shapes of all nodes without the batch, which is seen by evaluating two batches."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self.found: list[dict[str, tuple[int, ...]]] = []
        for batch in (2, 3):
            self.found.append({})
            with torch.no_grad():
                self.run(torch.zeros(batch, *program.input_shape))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[-1][n.name] = tuple(result.shape)
        return result

    def of(self, node: fx.Node) -> tuple[int, ...] | None:
        """Give a node's shape with -1 for the batch, ``None`` where the batch is not its first dimension alone."""
        two, three = (found.get(node.name) for found in self.found)
        if two is None or three is None or two[:1] != (2,) or three[:1] != (3,) or two[1:] != three[1:]:
            return None
        return (-1, *two[1:])


TARGET = Target(
    "litert",
    ".tflite",
    (2, 3, 4, 5, 6, 7, 8),
    emit,
    loads_in_ort=False,
    several_tensors=False,
    recurrent_layers=False,
    precisions=("int8",),
)
