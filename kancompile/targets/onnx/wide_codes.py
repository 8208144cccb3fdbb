"""Store 16-bit codes of coefficients and weights, and 8-bit codes of weights, while they compute as float32.

A float initializer that holds ``code * row_scale * column_scale`` becomes the codes and the constant nodes that widen
them. ONNX Runtime folds constant nodes when it loads the file, so the file is half as large and computes the same at the
same speed::

    int16 codes [r, c] -> Cast to float -> Mul row scales [r, 1] -> Mul column scales [c]

The scales are few different powers of two. Many of them are stored as bytes that pick from a list.

Matrices of zeros and ones are stored as bytes as well. What has few numbers stays float32: the nodes would take more room.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.ir import BlockCodes, Contraction, PolynomialExpansion, Program
from kancompile.targets.onnx.folded_nodes import FoldedNodes

_LISTED_FROM = 64
"""Scales from which on bytes that pick are smaller than the scales themselves."""
_LEAST_CODES = 512
"""Numbers from which on 16-bit codes and the nodes that widen them are smaller than float32."""
_LEAST_SAVED = 96
"""Bytes that 8-bit codes have to save: two nodes and a scale."""


def store_wide_codes(graph: ir.Graph, program: Program) -> None:
    """Exchange float initializers for codes, in place; equal numbers are found whatever the exporter named them."""
    coded = {_key(values.numpy()): codes for values, codes in _coded(program)}
    if not coded:
        return
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        array = value.const_value.numpy()
        codes, nodes = coded.get(_key(array)), FoldedNodes(graph, name)
        if array.size < _LEAST_CODES and (codes is None or codes.bits > 8 or 3 * array.size < _LEAST_SAVED):
            continue
        if codes is not None:
            value.replace_all_uses_with(_widened(nodes, codes, array.shape))
        elif np.isin(array, (0.0, 1.0)).all():
            small = nodes.stored("bytes", array.astype(np.uint8))
            value.replace_all_uses_with(nodes.cast(small, ir.DataType.FLOAT))


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


def _widened(nodes: FoldedNodes, codes: BlockCodes, shape: tuple[int, ...]) -> ir.Value:
    """Write ``codes * row_scale * column_scale``, reshaped."""
    found = nodes.cast(nodes.stored("codes", codes.codes.numpy()), ir.DataType.FLOAT)
    found = nodes.op("Mul", [found, _scales(nodes, "rows", codes.row_scale[:, None])])
    if not bool((codes.column_scale == 1).all()):
        found = nodes.op("Mul", [found, _scales(nodes, "columns", codes.column_scale)])
    if shape != tuple(codes.codes.shape):
        found = nodes.op("Reshape", [found, nodes.stored("shape", np.array(shape, np.int64))])
    return found


def _scales(nodes: FoldedNodes, name: str, scales: Tensor) -> ir.Value:
    listed, picked = torch.unique(scales, return_inverse=True)
    if len(listed) == 1 or scales.numel() < _LISTED_FROM or len(listed) > 256:
        # one scale for all needs no copies
        stored = listed.reshape(()) if len(listed) == 1 else scales
        return nodes.stored(name, stored.numpy())
    numbers = nodes.cast(nodes.stored(name, picked.numpy().astype(np.uint8)), ir.DataType.INT32)
    return nodes.op("Gather", [nodes.stored(f"{name}_listed", listed.numpy()), numbers])
