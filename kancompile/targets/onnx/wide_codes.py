"""Store 16-bit codes of coefficients and weights, while they compute as float32.

A float initializer that holds ``code * row_scale * column_scale`` becomes the codes and the constant nodes that widen
them. ONNX Runtime folds constant nodes when it loads the file, so the file is half as large and computes the same at the
same speed::

    int16 codes [r, c] -> Cast to float -> Mul row scales [r, 1] -> Mul column scales [c]

The scales are few different powers of two. Many of them are stored as bytes that pick from a list.

Matrices of zeros and ones are stored as bytes as well. What has few numbers stays float32: the nodes would take more room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.ir import BlockCodes, Contraction, PolynomialExpansion, Program

_LISTED_FROM = 64
"""Scales from which on bytes that pick are smaller than the scales themselves."""
_LEAST_CODES = 512
"""Numbers from which on codes and the nodes that widen them are smaller than float32."""


def store_wide_codes(model: ir.Model, program: Program) -> None:
    """Exchange float initializers for codes, in place; equal numbers are found whatever the exporter named them."""
    coded = {_key(values.numpy()): codes for values, codes in _coded(program)}
    if not coded:
        return
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        array = value.const_value.numpy()
        if array.size < _LEAST_CODES:
            continue
        codes = coded.get(_key(array))
        if codes is not None:
            _Writer(model, name, value).widen(codes, array.shape)
        elif np.isin(array, (0.0, 1.0)).all():
            _Writer(model, name, value).cast(array.astype(np.uint8))


def _coded(program: Program) -> Iterator[tuple[Tensor, BlockCodes]]:
    """Yield every tensor that is coded, in each form in which the exporter may write it."""
    for layer in program.layers():
        contraction, expansions = program.contraction(layer), program.expansions(layer)
        for expansion in expansions:
            if isinstance(expansion, PolynomialExpansion) and expansion.codes is not None:
                yield from ((codes.values(), codes) for codes in expansion.codes)
        if isinstance(contraction, Contraction) and contraction.codes is not None:
            codes = contraction.codes
            yield contraction.weight, codes
            if contraction.geometry is None and len(expansions) > 1:
                sizes = [expansion.n_in * expansion.k for expansion in expansions]
                bounds = np.cumsum([0, *sizes]).tolist()
                parts = [codes.columns(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
                yield from ((part.values(), part) for part in parts)


def _key(array: NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array, np.float32).tobytes()


class _Writer:
    """Builds the nodes that widen one initializer and puts them in its place."""

    def __init__(self, model: ir.Model, name: str, value: ir.Value) -> None:
        self.model, self.name, self.value = model, name, value
        self.nodes: list[ir.Node] = []

    def widen(self, codes: BlockCodes, shape: Iterable[int]) -> None:
        """Write ``codes * row_scale * column_scale``, reshaped."""
        found = self._cast(self._initializer("codes", codes.codes.numpy()), ir.DataType.FLOAT)
        found = self._node("Mul", [found, self._scales("rows", codes.row_scale[:, None])])
        found = self._node("Mul", [found, self._scales("columns", codes.column_scale)])
        shape = tuple(int(size) for size in shape)
        if shape != tuple(codes.codes.shape):
            found = self._node("Reshape", [found, self._initializer("shape", np.array(shape, np.int64))])
        self._replace(found)

    def cast(self, array: NDArray[np.uint8]) -> None:
        """Write small whole numbers as bytes."""
        self._replace(self._cast(self._initializer("bytes", array), ir.DataType.FLOAT))

    def _scales(self, suffix: str, scales: Tensor) -> ir.Value:
        listed, picked = torch.unique(scales, return_inverse=True)
        if len(listed) == 1 or scales.numel() < _LISTED_FROM or len(listed) > 256:
            # one scale for all needs no copies
            stored = listed.reshape([1] * scales.dim()) if len(listed) == 1 else scales
            return self._initializer(suffix, stored.numpy())
        bytes_ = self._initializer(suffix, picked.numpy().astype(np.uint8))
        numbers = self._cast(bytes_, ir.DataType.INT32)
        return self._node("Gather", [self._initializer(f"{suffix}_listed", listed.numpy()), numbers])

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self._node("Cast", [value], {"to": int(to)})

    def _initializer(self, suffix: str, array: NDArray[np.generic]) -> ir.Value:
        name = f"{self.name}.{suffix}"
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.initializers[name] = value
        return value

    def _node(self, operator: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {})
        node.outputs[0].name = f"{self.name}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def _replace(self, widened: ir.Value) -> None:
        uses = list(self.value.uses())
        first = next(node for node in self.model.graph if any(use.node is node for use in uses))
        self.model.graph.insert_before(first, self.nodes)
        for use in uses:
            use.node.replace_input_with(use.idx, widened)
        del self.model.graph.initializers[self.name]
