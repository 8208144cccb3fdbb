"""Evaluate a float program once and run again what follows one layer: the output with that layer alone computed otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import AnyContraction, Layer, Program, Values, nodes_of
from kancompile.validation.layer_pairs import LayerPair

ComputeLayer = Callable[[Mapping[str, Tensor]], Tensor]
"""Gives the output of one use of a layer from what its float expansions read, by their names."""
_ELEMENTS = 1 << 23
_FEW, _MANY = 8, 256


class FloatReplay:
    """A float program evaluated once, with every value kept, so that what follows one layer can be run again.

    Attributes:
        values: what every node yields, by its name; what only an evaluated contraction reads is dropped.
        output: of the program.
    """

    def __init__(self, program: Program, x: Values) -> None:
        self.program = program
        self._interpreter = _Keeping(program)
        with torch.no_grad():
            self.output: Values = program.by_name(self._interpreter.run(*program.arguments(x)))
        self.values = {node.name: value for node, value in self._interpreter.env.items() if isinstance(value, Tensor)}
        self._x = x

    def with_layer(self, pair: LayerPair, compute: ComputeLayer | None = None) -> Values:
        """Return the program's output with one layer computed otherwise in every use.

        Args:
            pair: the layer.
            compute: gives its output from what its float expansions read, by their names; as it was lowered without.
        """
        known, behind = self._interpreter.env, set(nodes_of(self.program, pair.float_layer.contraction))
        for node in self.program.graph_module.graph.nodes:
            if any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        compute = compute or (lambda read: pair.output(pair.features(read)))
        interpreter = _Keeping(self.program, {pair.float_layer.contraction: compute})
        kept = {node: value for node, value in known.items() if node not in behind and value is not None}
        with torch.no_grad():
            output = interpreter.run(*self.program.arguments(self._x), initial_env=kept)
        found: Values = self.program.by_name(output)
        return found


class _Keeping(fx.Interpreter):
    """Keep all values but those that nothing reads any more; in a KAN those of expansions are the large ones."""

    def __init__(self, program: Program, otherwise: Mapping[str, ComputeLayer] | None = None) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self.otherwise = otherwise or {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and n.target in self.otherwise:
            read = {str(source.target): self.env[source.all_input_nodes[0]] for source in n.all_input_nodes}
            return self.otherwise[str(n.target)](read)
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(self.module.get_submodule(str(n.target)), AnyContraction):  # type: ignore[operator]
            for source in n.all_input_nodes:
                if all(user in self.env or user is n for user in source.users):
                    self.env[source] = None
        return result


def samples_that_fit(program: Program, x: Values) -> int:
    """Return how many samples can be kept at every node, and expanded by the widest layer."""
    replay = FloatReplay(program, x[:2])
    kept = sum(value.numel() for value in replay.values.values())
    widest = max((_expanded(replay, layer) for layer in program.layers()), default=0)
    return max(_FEW, min(_MANY, len(x), _ELEMENTS // max(1, kept // 2 + widest)))


def _expanded(replay: FloatReplay, layer: Layer) -> int:
    """Count the values of a layer's functions for one sample; an image may have more pixels than its expansion."""
    total = 0
    calls = replay.program.calls()
    for target, expansion in zip(layer.expansions, replay.program.expansions(layer), strict=True):
        read = replay.values.get(calls[target][0].all_input_nodes[0].name)
        inputs = torch.Size(expansion.in_shape).numel()
        total += max(inputs, 0 if read is None else read[0].numel()) * expansion.k
    return total
