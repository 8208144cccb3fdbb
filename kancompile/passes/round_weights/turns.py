"""Which layers can be rounded at the same time: those whose features do not depend on each other's weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from kancompile.ir import Layer, Program


def turns(program: Program, layers: Sequence[Layer], most: int) -> list[list[Layer]]:
    """Divide layers into turns, in an order that does not depend on ``most``.

    A layer comes behind every earlier one whose weights or tables it reads from, through whatever lies between, and behind
    every earlier one that reads from it, as layers that are used again may: each is rounded on what it is without turns.

    Args:
        program: the program.
        layers: in the order of evaluation.
        most: layers in a turn.
    """
    waves: list[list[Layer]] = []
    depth: dict[str, int] = {}
    before = _read_from(program)
    for layer in layers:
        tied = [
            depth[one.contraction]
            for one in layers[: len(depth)]
            if before[layer.contraction] & {one.contraction, *one.expansions}
            or before[one.contraction] & {layer.contraction, *layer.expansions}
        ]
        depth[layer.contraction] = max(tied, default=-1) + 1
        if depth[layer.contraction] == len(waves):
            waves.append([])
        waves[depth[layer.contraction]].append(layer)
    return [wave[start : start + most] for wave in waves for start in range(0, len(wave), most)]


def _read_from(program: Program) -> dict[str, set[str]]:
    """Give for every module the modules whose results reach one of its uses."""
    reach: dict[fx.Node, set[str]] = {}
    found: dict[str, set[str]] = {}
    for node in program.graph_module.graph.nodes:
        seen: set[str] = set()
        for one in node.all_input_nodes:
            seen |= reach[one]
        if node.op == "call_module":
            found.setdefault(str(node.target), set()).update(seen)
            seen = seen | {str(node.target)}
        reach[node] = seen
    return found
