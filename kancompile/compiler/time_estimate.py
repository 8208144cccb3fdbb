"""Estimate where a file spends its time, by the recipe's costs of operators: no clock decides what a manifest says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import RECURRENCES, Program, Values
from kancompile.recipe import LookUpCosts

_FLOAT_PRODUCT, _ELEMENT, _FUNCTION = 0.05, 0.3, 4.0
"""Nanoseconds of ONNX Runtime on one thread for a product of floats, for an element that is moved or added, and for one of which
a function is computed."""
_NODES_OF_LAYER = 6
_OF_ELEMENTS = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "neg", "relu", "abs", "clamp", "maximum", "minimum", "where", "full"),
        *("mean", "sum", "amax", "amin", "avg_pool2d", "max_pool2d_with_indices", "copy", "_to_copy", "clone"),
        *("view", "reshape", "permute", "cat", "slice", "select", "constant_pad_nd", "expand"),
    )
)
_PICKS = frozenset(("embedding", "gather", "index", "index_select"))  # which read no more than they give


def estimate_times(program: Program, x: Values, costs: LookUpCosts) -> dict[fx.Node, float]:
    """Estimate for every node that depends on an input the nanoseconds of one sample; runtimes fold the others at load.

    Args:
        program: lowered or not.
        x: a few samples that it takes.
        costs: of integer layers and of any node.
    """
    found = _Costs(program, costs)
    with torch.no_grad():
        found.run(*program.arguments(x))
    return {node: costs.node * nodes + elements / len(x) for node, (nodes, elements) in found.found.items()}


class _Costs(fx.Interpreter):
    """Evaluate a program and keep of every node how many it becomes, and nanoseconds of its elements."""

    def __init__(self, program: Program, costs: LookUpCosts) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False
        self.found: dict[fx.Node, tuple[int, float]] = {}
        self.varying: set[fx.Node] = set()
        self.of_module: dict[str, tuple[int, float]] = {}  # nodes, and nanoseconds for an element of the result
        for layer in program.layers():
            product = _FLOAT_PRODUCT if program.is_float(layer) else costs.product
            self.of_module[layer.contraction] = (_NODES_OF_LAYER, product * program.contraction(layer).products)
            tables = program.tables(layer)
            for target in layer.expansions:
                self.of_module[target] = (0, costs.gather / tables[target].k if target in tables else _FUNCTION)

    def run_node(self, node: fx.Node) -> Any:
        arguments = [self.env[source] for source in node.all_input_nodes]
        result = super().run_node(node)
        if node.op != "placeholder" and self.varying.isdisjoint(node.all_input_nodes):
            return result
        self.varying.add(node)
        size = sum(value.numel() for value in torch.utils._pytree.tree_leaves(result) if _is_tensor(value))
        if node.op == "call_module":
            nodes, element = self.of_module[str(node.target)]
            self.found[node] = (nodes, element * size)
        elif isinstance(node.target, torch._ops.OpOverload):
            read = sum(value.numel() for value in arguments if _is_tensor(value))
            self.found[node] = (1, _nanoseconds(str(node.target.overloadpacket.__name__), arguments, size, read))
        return result


def _nanoseconds(operator: str, arguments: list[Any], size: int, read: int) -> float:
    if operator in ("mm", "addmm", "bmm", "baddbmm"):
        return _FLOAT_PRODUCT * size * int(arguments[-1].shape[-2])
    if operator in RECURRENCES:
        (steps, batch, _), (directions, gates, _) = arguments[0].shape, arguments[1].shape
        products = int(arguments[1].numel() + arguments[2].numel())
        return float(steps * batch) * (_FLOAT_PRODUCT * products + _FUNCTION * int(directions * gates))
    if operator == "convolution":
        return _FLOAT_PRODUCT * size * int(arguments[1][0].numel())
    if operator in _PICKS:
        return _ELEMENT * size
    return (_ELEMENT if operator in _OF_ELEMENTS else _FUNCTION) * max(size, read)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
