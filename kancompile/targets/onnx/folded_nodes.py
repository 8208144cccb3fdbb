"""Nodes on constants, which ONNX Runtime folds when it loads a file: what is stored small computes in another form.

They are added at the end of a graph, which is sorted when all are there; and what they replace goes once nobody reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class FoldedNodes(ir.tape.Tape):
    """Records nodes and stores constants for them, whose names begin with ``prefix``."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        super().__init__(graph)
        self.graph, self.prefix = graph, prefix

    def stored(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return the constant of a name, stored when it is first asked for."""
        name = f"{self.prefix}.{name}"
        known = self.graph.initializers.get(name)
        return self.initializer(ir.tensor(array), name) if known is None else known

    def shape(self, *sizes: int) -> ir.Value:
        """Store sizes as an operator reads them."""
        return self.stored("_".join(map(str, ("shape", *sizes))), np.array(sizes, np.int64))

    def put_for_columns(self, stand_in: ir.Node, columns: ir.Value, since: int) -> None:
        """Let columns, which are a matrix already, take the place of a stand-in and of a product's view of it as one.

        Args:
            stand_in: the node, which goes.
            columns: that were written for it.
            since: number of the first node that was.
        """
        for written in self.nodes[since:]:
            written.metadata_props.update(stand_in.metadata_props)
        for use in list(stand_in.outputs[0].uses()):
            ir.convenience.replace_all_uses_with(use.node.outputs[0], columns)
            self.graph.remove(use.node, safe=True)
        self.graph.remove(stand_in, safe=True)

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """Convert numbers."""
        return self.op("Cast", [value], {"to": int(to)})
