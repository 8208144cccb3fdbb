"""Let NaN among the inputs of a sample through to all of its outputs.

    y = f(x)   ->   bad = any(isnan(x)) of each sample;   y = where(bad, NaN, f(where(isnan(x), 0, x)))

A table reads NaN as its lowest input, and float layers may make the runtime refuse the call. Behind the guard no layer sees
NaN, so that integer layers stay what they are and every precision answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from kancompile.ir import Program, with_history

aten = torch.ops.aten


@dataclass(frozen=True)
class GuardNaN:
    """Guard every input and output of real numbers; the second run changes nothing."""

    name = "guard-nan"

    def __call__(self, program: Program) -> Program:
        """Return the program with guards.

        Args:
            program: any program.
        """
        if any(change.name == self.name for change in program.history):
            return program
        guarded = program.replace_modules({})
        root, graph = guarded.graph_module, guarded.graph_module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        real = [
            node
            for node, entry in zip(placeholders, program.interface.inputs, strict=True)
            if entry.dtype.is_floating_point
        ]
        if not real:
            return program
        values = program(program.zeros(2))
        outputs = [values] if isinstance(values, torch.Tensor) else list(values)
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            bad = [self._in(graph, node) for node in real]
            found = bad[0]
            for other in bad[1:]:
                found = graph.call_function(aten.maximum.default, (found, other))
            is_bad = graph.call_function(aten.gt.Scalar, (found, 0.5))
        output = next(node for node in graph.nodes if node.op == "output")
        returned = list(output.all_input_nodes)
        with graph.inserting_before(output):
            replaced = {
                node: self._out(graph, node, is_bad, value.ndim)
                for node, value in zip(returned, outputs, strict=True)
                if value.is_floating_point()
            }
        for node, safe in replaced.items():
            output.replace_input_with(node, safe)
        return with_history(self.name, program, guarded.with_graph(graph, root))

    def _in(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Say of each sample in ``[b]`` whether it has NaN, as 1 or 0, and let what reads the input read 0 in its place."""
        users = list(node.users)
        isnan = graph.call_function(aten.isnan.default, (node,))
        safe = graph.call_function(aten.masked_fill.Scalar, (node, isnan, 0.0))
        for user in users:
            user.replace_input_with(node, safe)
        counted = graph.call_function(aten._to_copy.default, (isnan,), {"dtype": torch.float32})
        flat = graph.call_function(aten.flatten.using_ints, (counted, 1))
        return graph.call_function(aten.amax.default, (flat, [1]))

    def _out(self, graph: fx.Graph, node: fx.Node, is_bad: fx.Node, dims: int) -> fx.Node:
        for _ in range(dims - 1):
            is_bad = graph.call_function(aten.unsqueeze.default, (is_bad, -1))
        return graph.call_function(aten.masked_fill.Scalar, (node, is_bad, float("nan")))
