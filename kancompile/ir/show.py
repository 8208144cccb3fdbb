"""Print programs for people and golden tests, and keep in words what each pass changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from kancompile.ir.contraction import AnyContraction
from kancompile.ir.expansion import AnyExpansion
from kancompile.ir.operator_names import operator_name
from kancompile.ir.program import PassChange, Program


def with_history(name: str, before: Program, after: Program) -> Program:
    """Return ``after``, made from ``before`` by the pass of that name, with a line about it in its history."""
    old, new = node_texts(before, in_words=True), node_texts(after, in_words=True)
    nodes = [*old, *(node for node in new if node not in old)]
    changed = [node for node in nodes if old.get(node) != new.get(node)]
    names = _names_of_layers(before) | _names_of_layers(after)
    changes = tuple((names.get(node, node), old.get(node), new.get(node)) for node in changed)
    notes = after.notes[len(before.notes) :]
    return replace(after, history=(*before.history, PassChange(name, changes, notes)))


def node_texts(program: Program, in_words: bool = False) -> dict[str, str]:
    """Describe every operation, without its inputs, by the name of its node.

    Args:
        program: what it is of.
        in_words: for readers of reports: without names of graph nodes, and a layer's first use alone.
    """
    texts, calls = {}, program.calls()
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            module, uses = program.module(node.target), calls[node.target]
            if in_words and node is not uses[0]:
                continue
            text = type(module).__name__
            if isinstance(module, AnyContraction | AnyExpansion):
                text = module.in_words() if in_words else module.text()
            if len(uses) > 1 and not in_words:
                text = f"{node.target}, use {uses.index(node) + 1} of {len(uses)}: {text}"
            texts[node.name] = text
        elif node.op == "call_function":
            texts[node.name] = operator_name(str(node.target)) if in_words else str(node.target)
    return texts


def _names_of_layers(program: Program) -> dict[str, str]:
    """Name the layer, as the user's model calls it, of every node that belongs to one."""
    owners = {part: layer.name for layer in program.layers() for part in (layer.contraction, *layer.expansions)}
    nodes = program.graph_module.graph.nodes
    return {node.name: owners[node.target] for node in nodes if node.op == "call_module" and node.target in owners}


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
