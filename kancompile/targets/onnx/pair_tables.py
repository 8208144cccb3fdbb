"""Put tables of all pairs of rows into a model without storing them.

    pairs[L * i + j] = table[i] beside table[j]

is written as nodes on the stored table, which ONNX Runtime folds when it loads the file: 255 rows of 5 bytes stay 1.3 kB in
the file and become 650 kB in memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def build_pair_tables(model: ir.Model) -> None:
    """Give every Gather whose row numbers a MatMulInteger joined the table of pairs, in place."""
    made: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Gather":
            continue
        table, joined = node.inputs
        assert table is not None
        assert joined is not None
        producer = joined.producer()
        if producer is None or producer.op_type != "MatMulInteger":
            continue
        assert table.name is not None
        if table.name not in made:
            made[table.name] = _pairs(model, node, table)
        node.replace_input_with(0, made[table.name])
        found = node.outputs[0]
        assert found.shape is not None
        # as exported, it gathers rows of one input; the Reshape behind it already expects those of two
        found.shape = ir.Shape([*list(found.shape)[:-1], 2 * int(table.shape[-1])])  # type: ignore[index,arg-type]


def _pairs(model: ir.Model, reader: ir.Node, table: ir.Value) -> ir.Value:
    assert table.shape is not None
    rows, k = (int(size) for size in table.shape.numpy())
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {})
        node.outputs[0].name = f"{table.name}.pairs{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    def shape(*sizes: int) -> ir.Value:
        name = "pairs.shape_" + "_".join(map(str, sizes))
        if name not in model.graph.initializers:
            tensor = ir.tensor(np.array(sizes, np.int64), name=name)
            model.graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
            )
        return model.graph.initializers[name]

    first = add("Expand", [add("Reshape", [table, shape(rows, 1, k)]), shape(rows, rows, k)])
    second = add("Expand", [add("Reshape", [table, shape(1, rows, k)]), shape(rows, rows, k)])
    both = add("Reshape", [add("Concat", [first, second], {"axis": 2}), shape(rows * rows, 2 * k)])
    both.shape = ir.Shape([rows * rows, 2 * k])
    both.type = ir.TensorType(ir.DataType.UINT8)
    model.graph.insert_before(reader, nodes)
    return both
