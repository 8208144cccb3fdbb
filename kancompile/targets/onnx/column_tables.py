"""Look few functions of an input up column by column in front of a linear layer (see ``kancompile.ir.column_lookup``).

    index [b, n] -> Concat for each function -> Cast -> GatherElements [L, k * n], axis 0 -> QGemm

The table of every column is made of the stored one by nodes on constants that ONNX Runtime folds when it loads the file. The
columns are the rows of a matrix already, so there is no Reshape in front of the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from kancompile.ir import (
    IntegerContraction,
    Layer,
    Program,
    TableExpansion,
    fits_columns,
    functions_major,
    nodes_of,
    reorders_columns,
)
from kancompile.targets.onnx.folded_nodes import FoldedNodes
from kancompile.targets.onnx.translation import COLUMN_LOOKUP


class ColumnTable(TableExpansion):
    """A table whose functions are columns, ``[b, *, k * n_in, 1]``."""

    def __init__(self, table: TableExpansion) -> None:
        super().__init__(**table.fields())
        self.register_buffer("group", _groups(table))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, k * n_in, 1]``."""
        codes: Tensor = torch.ops.kancompile.expand_columns(self.to_index(x), self.table, self.get_buffer("group"))
        return codes


def _groups(table: TableExpansion) -> Tensor:
    if table.first_row is None:
        return torch.zeros(table.n_in, dtype=torch.int64)
    return table.first_row.long() // table.rows


def in_columns(program: Program, layer: Layer) -> list[str]:
    """Give the tables of a layer that are looked up column by column; several functions only where all tables fit."""
    tables = program.tables(layer)
    if program.is_float(layer) or len(program.contraction(layer).matrix_shape) > 2:  # a window
        return []
    once = len(layer.expansions) == len(tables)
    alone = once and all(len(node.users) == 1 for target in tables for node in nodes_of(program, target))
    several = alone and reorders_columns(program.node(layer.contraction, IntegerContraction), list(tables.values()))
    fit = [
        t for t, table in tables.items() if type(table) is TableExpansion and _all_read(table) and fits_columns(table)
    ]
    if several and all(target in fit or table.k == 1 for target, table in tables.items()):
        return fit
    return [target for target in fit if tables[target].k == 1]


def _all_read(table: TableExpansion) -> bool:
    return int(_groups(table).max()) + 1 == table.n_tables


def arrange_columns(program: Program) -> Program:
    """Put the tables of linear layers into columns, and their weights into the order of these."""
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        targets, tables = in_columns(program, layer), program.tables(layer)
        modules |= {target: ColumnTable(tables[target]) for target in targets}
        if any(tables[target].k > 1 for target in targets):
            contraction = program.node(layer.contraction, IntegerContraction)
            order = functions_major([tables[target] for target in layer.expansions])
            modules[layer.contraction] = contraction.replace(codes=contraction.matrix[:, order])
    return program.replace_modules(modules) if modules else program


def write_column_tables(graph: ir.Graph) -> None:
    """Replace every stand-in of ``translation.expand_columns``, in place."""
    nodes = FoldedNodes(graph, "columns")
    made: dict[tuple[ir.Value, bytes], ir.Value] = {}
    for node in [node for node in graph if node.op_type == COLUMN_LOOKUP]:
        index, table, groups = node.inputs
        assert index is not None
        assert index.shape is not None
        assert table is not None
        assert groups is not None
        assert groups.const_value is not None
        group = groups.const_value.numpy()
        key = (table, group.tobytes())
        before = len(nodes.nodes)
        if key not in made:
            made[key] = _columns(nodes, table, group)
        nodes.put_for_columns(node, _looked_up(nodes, index, made[key], len(group)), before)


def _looked_up(nodes: FoldedNodes, index: ir.Value, columns: ir.Value, n_in: int) -> ir.Value:
    assert index.shape is not None
    assert columns.shape is not None
    functions = int(columns.shape[1]) // n_in  # type: ignore[arg-type]
    rows = index if len(index.shape) == 2 else nodes.op("Reshape", [index, nodes.shape(-1, n_in)])
    if functions > 1:
        rows = nodes.op("Concat", [rows] * functions, {"axis": 1})
    if index.dtype != ir.DataType.INT32:
        rows = nodes.cast(rows, ir.DataType.INT32)
    return nodes.op("GatherElements", [columns, rows], {"axis": 0})


def _columns(nodes: FoldedNodes, table: ir.Value, group: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    """Write the tables of all columns side by side, uint8 ``[L, k * n]``."""
    assert table.shape is not None
    total, k = table.shape.numpy()
    n_in, count = len(group), int(group.max()) + 1
    rows = total // count
    shape = ir.Shape([rows, k * n_in])
    found = ir.val(None, ir.DataType.UINT8, shape)
    if count == 1 and k == 1:
        return nodes.op("Expand", [table, nodes.shape(rows, n_in)], output=found)
    apart = nodes.op("Reshape", [table, nodes.shape(count, rows, k)])
    apart = nodes.op("Transpose", [apart], {"perm": [1, 2, 0]})
    if count == 1:
        apart = nodes.op("Expand", [apart, nodes.shape(rows, k, n_in)])
    elif not np.array_equal(group, np.arange(n_in)):
        picks = nodes.stored(f"group{len(nodes.nodes)}", group.astype(np.int32))
        apart = nodes.op("Gather", [apart, picks], {"axis": 2})
    return nodes.op("Reshape", [apart, nodes.shape(rows, k * n_in)], output=found)
