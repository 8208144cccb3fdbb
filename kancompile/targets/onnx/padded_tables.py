"""Store tables whose last rows are equal without these, which ONNX Runtime adds again when it loads the file.

Tables are padded up to 256 rows, where QuantizeLinear saturates, so that no Clip is needed (``arrange_tables.pad_rows``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kancompile.targets.onnx.folded_nodes import FoldedNodes

_WORTH = 256  # bytes from which on rows are more than a node and its names


def store_padded_tables(graph: ir.Graph) -> None:
    """Exchange uint8 initializers ``[rows, k]`` for their first rows and a Pad, in place."""
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.UINT8 or value.const_value is None:
            continue
        table = value.const_value.numpy()
        if table.ndim != 2:
            continue
        kept = len(table) - _equal_at_end(table)
        if table[kept:].size < _WORTH:
            continue
        nodes = FoldedNodes(graph, name)
        ends = nodes.stored("added", np.array([0, 0, len(table) - kept, 0], np.int64))
        padded = nodes.op("Pad", [nodes.stored("rows", table[:kept]), ends], {"mode": "edge"})
        ir.convenience.replace_all_uses_with(value, padded)


def _equal_at_end(table: np.ndarray) -> int:  # type: ignore[type-arg]
    """Count the rows at the end that repeat the one before them."""
    different = np.nonzero((table != table[-1]).any(1))[0]
    first = int(different[-1]) + 1 if len(different) else 0
    return len(table) - first - 1
