"""Write joint lookups of inputs as lookups of single ones, for targets that have no others.

    sum_c C[o, c] (parts[0, c, row_a] + parts[1, c, row_b]) = sum_c C[o, c] parts[0, c, row_a] + sum_c C[o, c] parts[1, c, row_b]

Sums of integers, so outputs stay equal in every bit. Weights are stored, and multiplied, once for each member.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from kancompile.ir import IntegerContraction, JointTable, Layer, Program, nodes_of, with_history


@dataclass(frozen=True)
class LookUpMembers:
    """Divide every joint table into tables of its members; the second run changes nothing."""

    target: str

    name = "look-up-members"

    def __call__(self, program: Program) -> Program:
        """Return the program without joint tables.

        Args:
            program: an integer program.
        """
        if not any(True for _ in program.nodes(JointTable)):
            return program
        copy = program.replace_modules({})
        root, graph = copy.graph_module, copy.graph_module.graph
        notes: list[str] = []
        for layer in copy.layers():
            if any(isinstance(copy.module(target), JointTable) for target in layer.expansions):
                notes += self._divide(copy, layer)
        divided = copy.with_graph(graph, root)
        return with_history(self.name, program, replace(divided, notes=(*divided.notes, *notes)))

    def _divide(self, program: Program, layer: Layer) -> list[str]:
        """Divide the joint tables of one layer, in place, and say what that costs."""
        root, graph = program.graph_module, program.graph_module.graph
        contraction = program.node(layer.contraction, IntegerContraction)
        parts: dict[str, list[str]] = {}
        columns: list[Tensor] = []
        start = 0
        for target, table in zip(layer.expansions, program.expansions(layer), strict=True):
            own = start + torch.arange(table.n_in * table.k)
            start += len(own)
            if not isinstance(table, JointTable):
                columns.append(own)
                continue
            by_word = own.reshape(table.parts.shape[1:3]).T.flatten()
            for number, member in enumerate(table.by_member()):
                parts.setdefault(target, []).append(f"{target}_{number}")
                root.add_module(parts[target][-1], member)
                columns.append(by_word)
        codes = contraction.matrix[:, torch.cat(columns)]
        root.add_module(layer.contraction, contraction.replace(codes=codes, group_sizes=None))
        for reader in nodes_of(program, layer.contraction):
            read, sources = reader.all_input_nodes, list[fx.Node]()
            for node in read:
                with graph.inserting_before(node):
                    members = [graph.call_module(name, node.args) for name in parts.get(str(node.target), ())]
                sources += members or [node]
            reader.args = tuple(sources)
            for node in read:
                if not node.users:
                    graph.erase_node(node)
        before = contraction.matrix.shape[1]
        if codes.shape[1] == before:
            return []
        products = f"{codes.shape[1]} products for an output, where joint lookups take {before}"
        return [f"layer {layer.name!r}: target {self.target!r} looks up single inputs only: {products}"]
