"""Layers that a network uses several times: one module called by several nodes, or a layer for every use.

    y = contract(expand(x)); z = contract(expand(y))      <->      y = contract(expand(x)); z = contract_1(expand_1(y))

On the left the program says that a layer is one. On the right ranges, tables and weights can be chosen for each use alone, and
a file holds a copy for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kancompile.ir.contraction import AnyContraction
from kancompile.ir.program import Program
from kancompile.ir.show import with_history


def share_uses(program: Program, same: Iterable[Sequence[str]]) -> Program:
    """Return the program in which layers of the same weights and functions are uses of one, the first of them.

    Args:
        program: a captured program.
        same: groups of names of layers; names that the program does not have do not count.
    """
    layers = {layer.name: (layer.contraction, *layer.expansions) for layer in program.layers()}
    first: dict[str, str] = {}
    for group in same:
        uses = [layers[name] for name in group if name in layers]
        if len(uses) > 1:
            first |= {target: shared for use in uses for target, shared in zip(use, uses[0], strict=True)}
    if not first:
        return program
    graph = program.replace_modules({}).graph_module.graph
    for node in graph.nodes:
        node.target = first.get(str(node.target), node.target)
    own = {target: program.module(target) for target in first}
    return replace(program.with_graph(graph, program.graph_module), uses=own)


def separate_uses(program: Program) -> Program:
    """Return the program in which every use of a layer is a layer as it was captured, with tensors and a name of its own."""
    if not program.uses:
        return program
    separate = program.replace_modules({})
    root, graph = separate.graph_module, separate.graph_module.graph
    for name, module in program.uses.items():
        root.add_module(name, module)
    for node in graph.nodes:
        node.target = node.name if node.name in program.uses else node.target
    apart = separate.with_graph(graph, root)
    pairs = zip(program.nodes(AnyContraction), apart.nodes(AnyContraction), strict=True)
    kinds = {own.layer: f"use of {first.layer}" for (_, first), (_, own) in pairs if own.layer != first.layer}
    return with_history("separate-uses", program, replace(apart, uses={}, kinds={**program.kinds, **kinds}))
