"""LiteRT forms of the float operators that may stand between and behind KAN layers.

Each function receives the file, the node's shape (``None`` where the batch is not its first dimension alone) and the
operator's arguments, tensors as :class:`Value` or, where constant, as tensors. It returns the output, or ``None`` where the
arguments ask for something that has no form here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kancompile.targets.litert.file import LiteRTFile, Value

Shape = tuple[int, ...] | None
_aten = torch.ops.aten


def _reshape(file: LiteRTFile, shape: Shape, x: Value, *_: Any, **__: Any) -> Value | None:
    return None if shape is None else file.reshape(x, shape)


def _same(file: LiteRTFile, shape: Shape, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _permute(file: LiteRTFile, shape: Shape, x: Value, order: Sequence[int]) -> Value | None:
    wrapped = [position % len(x.shape) for position in order]
    return None if wrapped[0] != 0 else file.transpose(x, wrapped)


def _transpose(file: LiteRTFile, shape: Shape, x: Value, first: int, second: int) -> Value | None:
    order = list(range(len(x.shape)))
    first, second = first % len(order), second % len(order)
    order[first], order[second] = order[second], order[first]
    return _permute(file, shape, x, order)


def _unary(operator: str) -> Callable[..., Value | None]:
    def emit(file: LiteRTFile, shape: Shape, x: Value) -> Value:
        return file.unary(operator, x)

    return emit


def _silu(file: LiteRTFile, shape: Shape, x: Value) -> Value:
    return file.binary("MUL", x, file.unary("LOGISTIC", x))


def _binary(operator: str) -> Callable[..., Value | None]:
    def emit(file: LiteRTFile, shape: Shape, x: Any, y: Any, alpha: float = 1) -> Value | None:
        if alpha != 1 or shape is None:
            return None
        values = [_value(file, side) for side in (x, y)]
        if any(value.dtype != "float32" for value in values):
            return None
        return file.binary(operator, *values)

    return emit


def _value(file: LiteRTFile, x: Any) -> Value:
    if isinstance(x, Value):
        return x
    array = x.detach().numpy() if isinstance(x, Tensor) else np.array(x)
    return file.constant(np.ascontiguousarray(array, np.float32))


def _batch_norm(file: LiteRTFile, shape: Shape, x: Value, *arguments: Any) -> tuple[Value] | None:
    weight, bias, mean, variance, _, epsilon = arguments
    if any(not isinstance(part, Tensor | None) for part in (weight, bias, mean, variance)):
        return None
    factor = 1 / torch.sqrt(variance + epsilon) * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - mean * factor
    place = [1, -1, *[1] * (len(x.shape) - 2)]
    return (
        file.binary(
            "ADD", file.binary("MUL", x, _value(file, factor.reshape(place))), _value(file, offset.reshape(place))
        ),
    )


def _mean(file: LiteRTFile, shape: Shape, x: Value, axes: Any, keep: bool = False, dtype: Any = None) -> Value | None:
    if shape is None or axes is None or dtype not in (None, torch.float32):
        return None
    sizes = axes if isinstance(axes, list | tuple) else [axes]
    wrapped = np.array([axis % len(x.shape) for axis in sizes], np.int32)
    return file.node("MEAN", [x, file.constant(wrapped)], shape, "float32", "ReducerOptions", keepDims=keep)


def _linear(file: LiteRTFile, shape: Shape, x: Value, weight: Any, bias: Any = None) -> Value | None:
    if shape is None or not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
        return None
    inputs = [x, _value(file, weight)]
    inputs.append(_value(file, torch.zeros(weight.shape[0]) if bias is None else bias))
    return file.node("FULLY_CONNECTED", inputs, shape, "float32", "FullyConnectedOptions", keepNumDims=len(shape) > 2)


def _addmm(
    file: LiteRTFile, shape: Shape, bias: Any, x: Any, weight: Any, beta: float = 1, alpha: float = 1
) -> Value | None:
    if beta != 1 or alpha != 1 or not isinstance(x, Value) or not isinstance(weight, Tensor):
        return None
    return _linear(file, shape, x, weight.T, bias)


def _mm(file: LiteRTFile, shape: Shape, x: Any, weight: Any) -> Value | None:
    return _linear(file, shape, x, weight.T) if isinstance(x, Value) and isinstance(weight, Tensor) else None


def _softmax(operator: str, options: str) -> Callable[..., Value | None]:
    def emit(file: LiteRTFile, shape: Shape, x: Value, axis: int, *rest: Any) -> Value | None:
        if axis not in (-1, len(x.shape) - 1) or any(part not in (None, False) for part in rest):
            return None
        values: dict[str, Any] = {"beta": 1.0} if operator == "SOFTMAX" else {}
        return file.node(operator, [x], x.shape, "float32", options, **values)

    return emit


def _pool(operator: str) -> Callable[..., Value | None]:
    def emit(
        file: LiteRTFile, shape: Shape, x: Value, kernel: Any, stride: Any = (), *rest: Any, **options: Any
    ) -> Value | None:
        # padding, dilation and so on must be what they are by default
        plain = all(part in (0, 1, False, None, [0, 0], [1, 1]) for part in (*rest, *options.values()))
        if shape is None or len(x.shape) != 4 or not plain:
            return None
        sides = [*kernel] * (2 // len(kernel)) if isinstance(kernel, list | tuple) else [kernel] * 2
        steps = [*stride] * (2 // len(stride)) if isinstance(stride, list | tuple) and stride else sides
        steps = [stride] * 2 if isinstance(stride, int) else steps
        image = file.transpose(x, [0, 2, 3, 1])
        pooled = file.node(
            operator,
            [image],
            (-1, shape[2], shape[3], shape[1]),
            "float32",
            "Pool2DOptions",
            padding=file.schema.Padding.VALID,
            filterHeight=sides[0],
            filterWidth=sides[1],
            strideH=steps[0],
            strideW=steps[1],
        )
        return file.transpose(pooled, [0, 3, 1, 2])

    return emit


ATEN: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            _aten.reshape.default,
            _aten.view.default,
            _aten._unsafe_view.default,
            _aten.flatten.using_ints,
            _aten.squeeze.dim,
            _aten.squeeze.dims,
            _aten.unsqueeze.default,
        ),
        _reshape,
    ),
    **dict.fromkeys((_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.contiguous.default), _same),
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.relu.default: _unary("RELU"),
    _aten.sigmoid.default: _unary("LOGISTIC"),
    _aten.tanh.default: _unary("TANH"),
    _aten.silu.default: _silu,
    _aten.add.Tensor: _binary("ADD"),
    _aten.sub.Tensor: _binary("SUB"),
    _aten.mul.Tensor: _binary("MUL"),
    _aten.div.Tensor: _binary("DIV"),
    _aten.mean.dim: _mean,
    _aten._native_batch_norm_legit_no_training.default: _batch_norm,
    _aten.linear.default: _linear,
    _aten.addmm.default: _addmm,
    _aten.mm.default: _mm,
    _aten.softmax.int: _softmax("SOFTMAX", "SoftmaxOptions"),
    _aten._softmax.default: _softmax("SOFTMAX", "SoftmaxOptions"),
    _aten.log_softmax.int: _softmax("LOG_SOFTMAX", "LogSoftmaxOptions"),
    _aten._log_softmax.default: _softmax("LOG_SOFTMAX", "LogSoftmaxOptions"),
    _aten.max_pool2d.default: _pool("MAX_POOL_2D"),
    _aten.avg_pool2d.default: _pool("AVERAGE_POOL_2D"),
}
