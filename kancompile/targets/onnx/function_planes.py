"""Look the few functions of a channel up one after the other, each into a plane of its own, in front of a convolution.

A Gather takes 4 to 8 ns for each row number, however short the row, a GatherElements 0.8 ns for each byte, and less where up
to three functions share a number (``kancompile.ir.packed_codes``). For up to five functions the planes are faster, need no table
of pairs, and leave no constant columns for the convolution to multiply; the reasons and the order of the columns are in
``kancompile.ir.column_order``. Every value that a program computes stays the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from kancompile.ir import (
    MOST,
    IntegerContraction,
    Layer,
    Program,
    TableExpansion,
    constant_block,
    is_in_planes,
    layer_tables,
    pack,
    plane_order,
    varying_functions,
)
from kancompile.targets.onnx.folded_nodes import FoldedNodes

_THREADED_ROWS = 16
"""GatherElements divides its work by rows, so the row numbers of an image are dealt out over so many."""


class PlanarTable(TableExpansion):
    """A table whose functions are planes, ``[b, *, 1, k' * n_in + m]``: ``k'`` functions that vary, and ``m`` constants.

    Attributes:
        added: the constants, one code for each of the last columns.
    """

    def __init__(self, table: TableExpansion, added: tuple[int, ...] = ()) -> None:
        super().__init__(**table.fields())
        self.added = added
        groups = varying_functions(table).split(MOST)
        self.sizes = [len(group) for group in groups]
        for number, group in enumerate(groups):
            self.register_buffer(f"word_{number}", pack([table.table[:, k].reshape(1, -1) for k in group.tolist()]))

    @property
    def words(self) -> list[Tensor]:
        """Tables of the functions that vary, up to three in a number, ``[1, T * levels]``."""
        return [self.get_buffer(f"word_{number}") for number in range(len(self.sizes))]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, 1, k' * n_in + m]``."""
        codes: Tensor = torch.ops.kancompile.expand_planes(
            self.to_index(x), self.words, self.sizes, self.first_row, self.added
        )
        return codes


def arrange_planes(program: Program) -> Program:
    """Put the columns of every convolution of few functions into planes."""
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        if can_be_planes(program, layer):
            modules |= _arranged(program, layer)
    return program.replace_modules(modules) if modules else program


def can_be_planes(program: Program, layer: Layer) -> bool:
    """Whether :func:`arrange_planes` applies to a layer."""
    contraction, tables = program.contraction(layer), list(program.tables(layer).values())
    alone = all(len(node.users) == 1 for node in program.graph_module.graph.nodes if node.target in layer.expansions)
    return (
        alone
        and len(layer.expansions) == len(tables)
        and isinstance(contraction, IntegerContraction)
        and contraction.geometry is not None
        and all(type(table) is TableExpansion for table in tables)
        and is_in_planes(contraction, tables)
    )


def _arranged(program: Program, layer: Layer) -> dict[str, nn.Module]:
    contraction = program.node(layer.contraction, IntegerContraction)
    tables = layer_tables(program, layer)
    order = plane_order(tables)
    block = constant_block(contraction, tables, len(order))
    planar = [PlanarTable(table) for table in tables[:-1]] + [PlanarTable(tables[-1], block.codes)]
    codes = torch.cat([contraction.matrix[:, order], block.weight], dim=1)
    return {
        **dict(zip(layer.expansions, planar, strict=True)),
        layer.contraction: contraction.replace(codes=codes, group_sizes=None),
    }


def deal_planes(graph: ir.Graph) -> None:
    """Finish the planes of a model, in place.

    The table of every plane is repeated for each row of row numbers, by nodes that are evaluated at load. The batch size that
    constant columns need is read off the input: reading it off a tensor that ONNX Runtime transposes would cost more nodes.
    """
    _share_batch_size(graph)
    nodes, made = FoldedNodes(graph, "planes"), dict[tuple[ir.Value, int], ir.Value]()
    for node in list(graph):
        if node.op_type != "GatherElements":
            continue
        table, rows = node.inputs
        assert table is not None
        assert table.shape is not None
        assert rows is not None
        assert rows.shape is not None
        count, size = rows.shape[0], table.shape[-1]
        if not isinstance(count, int) or not isinstance(size, int) or count == 1:
            continue
        if (table, count) not in made:  # functions that are equal share their table
            repeated = ir.val(None, shape=[count, size], type=table.type)
            made[table, count] = nodes.op("Expand", [table, nodes.shape(count, size)], output=repeated)
        node.replace_input_with(0, made[table, count])


def _share_batch_size(graph: ir.Graph) -> None:
    found = [node.outputs[0] for node in graph if node.op_type == "Shape" and _is_batch(node)]
    if not found:
        return
    shape = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1}, outputs=[ir.val(None, ir.DataType.INT64, [1])])
    graph.insert_before(graph[0], shape)
    for value in found:
        value.replace_all_uses_with(shape.outputs[0])


def _is_batch(node: ir.Node) -> bool:
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return start is not None and end is not None and (start.as_int(), end.as_int()) == (0, 1)


def threaded_rows(size: int) -> int:
    """Choose over how many rows the ``size`` row numbers of an image are dealt out."""
    return int(np.gcd(size, _THREADED_ROWS))
