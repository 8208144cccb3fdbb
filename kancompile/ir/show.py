"""Print programs for people and golden tests, and keep in words what each pass changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from kancompile.ir.contraction import AnyContraction
from kancompile.ir.expansion import AnyExpansion
from kancompile.ir.program import PassChange, Program


def with_history(name: str, before: Program, after: Program) -> Program:
    """Return ``after``, made from ``before`` by the pass of that name, with a line about it in its history."""
    old, new = node_texts(before), node_texts(after)
    nodes = [*old, *(node for node in new if node not in old)]
    changes = tuple((node, old.get(node), new.get(node)) for node in nodes if old.get(node) != new.get(node))
    notes = after.notes[len(before.notes) :]
    return replace(after, history=(*before.history, PassChange(name, changes, notes)))


def node_texts(program: Program) -> dict[str, str]:
    """Describe every operation, without its inputs, by the name of its node."""
    texts, calls = {}, program.calls()
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            module, uses = program.module(node.target), calls[node.target]
            texts[node.name] = (
                module.text() if isinstance(module, AnyContraction | AnyExpansion) else type(module).__name__
            )
            if len(uses) > 1:
                texts[node.name] = f"{node.target}, use {uses.index(node) + 1} of {len(uses)}: {texts[node.name]}"
        elif node.op == "call_function":
            texts[node.name] = str(node.target)
    return texts


def show(program: Program) -> str:
    """Print a program for people and golden tests, one line for each node."""
    texts = node_texts(program)
    lines = [f"program(input [b, {', '.join(map(str, program.input_shape))}])"]
    for node in program.graph_module.graph.nodes:
        if node.op == "output":
            lines.append(f"  return {_names(node.all_input_nodes)}")
        elif node.name in texts:
            lines.append(f"  {node.name} = {texts[node.name]}({_names(node.all_input_nodes)})")
    return "\n".join(lines)


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)
