"""Store the entries of tables in as many bits as they have, where that is smaller, while they are looked up as bytes.

As with narrow weights (``narrow_weights``), constant nodes widen bit planes, and ONNX Runtime folds them when it loads the file.
Most tables are shared by all inputs and take a few kB, of which the nodes would take more than they save: those stay bytes
(``TableExpansion.packs``). So do the float32 numbers that hold up to three functions in front of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kancompile.ir import Program, TableExpansion, packing_saves
from kancompile.targets.onnx.folded_nodes import FoldedNodes
from kancompile.targets.onnx.narrow_weights import sum_planes


def table_bits(program: Program) -> dict[str, int]:
    """Map the names of table initializers to the bits of their entries, where these are fewer than 8."""
    tables = [(f"{node.target}.table", table) for node, table in program.nodes(TableExpansion)]
    return {name: table.bits for name, table in tables if table.bits < 8}


def store_narrow_tables(graph: ir.Graph, bits_of: Mapping[str, int]) -> None:
    """Exchange uint8 initializers for bit planes and the nodes that widen them, in place, where that takes fewer bytes.

    Args:
        graph: the graph, in which tables may have been cut to their first rows (``padded_tables``).
        bits_of: names of tables to the bits of their entries.
    """
    for table, bits in bits_of.items():
        for name in (table, f"{table}.rows"):
            value = graph.initializers.get(name)
            if value is None or value.const_value is None or not value.uses():
                continue
            codes = value.const_value.numpy()
            if not packing_saves(codes.size, bits):
                continue
            nodes = FoldedNodes(graph, name)
            widened = nodes.cast(sum_planes(nodes, codes, bits), ir.DataType.UINT8)
            value.replace_all_uses_with(widened)
