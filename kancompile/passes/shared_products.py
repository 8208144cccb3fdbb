"""Write batched products that share one constant matrix as one product of all rows, as an ordinary layer has it.

    bmm(x [p, m, d], w of every p [d, o])      ->      reshape(mm(reshape(x, [-1, d]), w), [p, m, o])

``einsum``, ``matmul`` with a matrix of three dimensions and ``bmm`` with an expanded one are traced so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import Program, attribute

_ATEN = torch.ops.aten


def split_shared_products(program: Program, constant: Callable[[fx.Node], Tensor | None]) -> Program:
    """Rewrite such products; the very same program where there are none.

    Args:
        program: a captured program.
        constant: gives the value of what does not depend on data.
    """
    found = {}
    for node in program.graph_module.graph.nodes:
        if node.target is _ATEN.bmm.default:
            matrices = constant(node.args[1])
            if matrices is not None and torch.equal(matrices, matrices[:1].expand_as(matrices)):
                found[node] = matrices[0].clone()
    if not found:
        return program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph_module.graph, copies))
    root: dict[str, Any] = {}
    for number, (node, matrix) in enumerate(found.items()):
        copy, x = copies[node], copies[node.args[0]]
        root[f"shared_matrix{number}"] = matrix
        with graph.inserting_before(copy):
            sizes = [graph.call_function(_ATEN.sym_size.int, (x, dim)) for dim in (0, 1)]
            rows = graph.call_function(_ATEN.reshape.default, (x, [-1, len(matrix)]))
            product = graph.call_function(_ATEN.mm.default, (rows, graph.get_attr(f"shared_matrix{number}")))
            product.meta = copy.meta
            result = graph.call_function(_ATEN.reshape.default, (product, [*sizes, matrix.shape[1]]))
        copy.replace_all_uses_with(result)
        graph.erase_node(copy)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in root:
            root[node.target] = attribute(program.graph_module, node.target)
    return replace(program, graph_module=fx.GraphModule(root, graph))
