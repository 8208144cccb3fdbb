"""Put tables of all pairs of rows into a model without storing them.

    pairs[L * i + j] = table[i] beside table[j]

is written as nodes on the stored table, which ONNX Runtime folds when it loads the file: 255 rows of 5 bytes stay 1.3 kB in
the file and become 650 kB in memory.
"""

from __future__ import annotations

import onnx_ir as ir

from kancompile.targets.onnx.folded_nodes import FoldedNodes


def build_pair_tables(graph: ir.Graph) -> None:
    """Give every Gather whose row numbers a MatMulInteger joined the table of pairs, in place."""
    made: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Gather" or all(before.op_type != "MatMulInteger" for before in node.predecessors()):
            continue
        table, found = node.inputs[0], node.outputs[0]
        assert table is not None
        assert found.shape is not None
        if table not in made:
            made[table] = _pairs(FoldedNodes(graph, "pairs"), table)
        node.replace_input_with(0, made[table])
        # as exported, it gathers rows of one input; the Reshape behind it already expects those of two
        found.shape = ir.Shape([*found.shape[:-1], made[table].shape[-1]])  # type: ignore[index]


def _pairs(nodes: FoldedNodes, table: ir.Value) -> ir.Value:
    assert table.shape is not None
    rows, k = table.shape.numpy()
    column = nodes.op("Reshape", [table, nodes.shape(rows, 1, k)])
    first = nodes.op("Expand", [column, nodes.shape(rows, rows, k)])
    row = nodes.op("Reshape", [table, nodes.shape(1, rows, k)])
    second = nodes.op("Expand", [row, nodes.shape(rows, rows, k)])
    both = nodes.op("Concat", [first, second], {"axis": 2})
    found = ir.val(None, ir.DataType.UINT8, [rows * rows, 2 * k])
    return nodes.op("Reshape", [both, nodes.shape(rows * rows, 2 * k)], output=found)
