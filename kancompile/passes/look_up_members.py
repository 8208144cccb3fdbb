"""Write look-ups of pairs of inputs as look-ups of single ones, for targets that have no others.

    sum_c C[o, c] (parts[0, c, row_a] + parts[1, c, row_b]) = sum_c C[o, c] parts[0, c, row_a] + sum_c C[o, c] parts[1, c, row_b]

Sums of integers, so outputs stay equal in every bit. Weights are stored, and multiplied, once for each member.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kancompile.ir import IntegerContraction, JointTable, Program, with_history


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
        found = [node for node, _ in program.nodes(JointTable)]
        if not found:
            return program
        copy = program.replace_modules({})
        root, graph = copy.graph_module, copy.graph_module.graph
        notes = []
        for node in [node for node, _ in copy.nodes(JointTable)]:
            table = copy.node(str(node.target), JointTable)
            (reader,) = node.users
            contraction = copy.node(str(reader.target), IntegerContraction)
            planes, words = table.parts.shape[1:3]
            by_word = torch.arange(planes * words).reshape(planes, words).T.flatten()
            parts = []
            for number, member in enumerate(table.by_member()):
                target = f"{node.target}_{number}"
                root.add_module(target, member)
                with graph.inserting_before(node):
                    parts.append(graph.call_module(target, node.args))
            codes = torch.cat([contraction.matrix[:, by_word]] * len(parts), dim=1)
            root.add_module(str(reader.target), contraction.replace(codes=codes, group_sizes=None))
            reader.args = tuple(parts)
            graph.erase_node(node)
            notes.append(
                f"layer {contraction.layer!r}: target {self.target!r} looks up single inputs only: {codes.shape[1]} products for "
                f"an output, where a look-up of pairs takes {contraction.matrix.shape[1]}"
            )
        divided = copy.with_graph(graph, root)
        return with_history(self.name, program, replace(divided, notes=(*divided.notes, *notes)))
