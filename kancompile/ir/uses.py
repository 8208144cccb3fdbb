"""Layers that a network uses several times are one module, called by several nodes.

    y = contract(expand(x)); z = contract_1(expand_1(y))      ->      y = contract(expand(x)); z = contract(expand(y))

On the left stand layers of the same weights and functions. On the right the program says that they are one: ranges, tables and
weights are chosen for all uses together, and a file holds one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kancompile.ir.program import Program


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
    return program.with_graph(graph, program.graph_module)
