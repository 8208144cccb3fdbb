"""Give a network's output 8 bits, for targets on which real values do not leave the accelerator.

    y = contract(...); return y   ->   r = contract_to_index(...); return dequantize(r)

The range is that of the calibration outputs; what lies beyond saturates. Convolutions have an 8-bit output anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import REAL, IndexQuantizer, IntegerContraction, Program, Values, nodes_of, rows_of

_LEVELS = 256


@dataclass(frozen=True)
class QuantizeOutputs:
    """Quantize every output that a contraction with one scale group yields; the second run changes nothing."""

    name = "quantize-outputs"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with quantized outputs.

        Args:
            program: an integer program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        found = [str(node.target) for node in _returned(program.graph_module.graph) if _is_real(program, node)]
        if not found:
            return program
        traced = [program.trace(part, found) for part in x.split(512)]
        modules: dict[str, IntegerContraction] = {}
        for target in found:
            index = _quantizer(torch.cat([part[target][1] for part in traced]))
            modules[target] = program.node(target, IntegerContraction).replace(hands_over=rows_of(index))
        quantized = program.replace_modules(modules)
        graph = quantized.graph_module.graph
        for node in _returned(graph):
            output = modules[str(node.target)].output if str(node.target) in modules else None
            if output is not None:
                users = list(node.users)
                with graph.inserting_after(node):
                    arguments: tuple[Any, ...] = (node, output.scale, output.zero_point)
                    real = graph.call_function(torch.ops.kancompile.dequantize_index.default, arguments)
                for user in users:
                    user.replace_input_with(node, real)
        return quantized.with_graph(graph, quantized.graph_module)


def _returned(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in graph.nodes if node.op == "output")
    return list(output.all_input_nodes)


def _is_real(program: Program, node: fx.Node) -> bool:
    contraction = program.module(str(node.target)) if node.op == "call_module" else None
    return (
        isinstance(contraction, IntegerContraction)
        and contraction.geometry is None
        and contraction.hands_over == REAL
        and len(contraction.group_sizes) == 1
        and len(node.users) == 1
        and nodes_of(program, str(node.target)) == [node]  # other uses hand real values on
    )


def _quantizer(y: Tensor) -> IndexQuantizer:
    low, high = min(0.0, float(y.min())), max(0.0, float(y.max()))
    scale = max(high - low, 1e-6) / (_LEVELS - 1)
    return IndexQuantizer(scale, round(-low / scale), _LEVELS)
