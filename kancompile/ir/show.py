"""Print programs for people and golden tests, and keep in words what each pass changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from kancompile.ir.contraction import Contraction, QuantizedContraction
from kancompile.ir.convolution import ConvContraction, QuantizedConvContraction
from kancompile.ir.expansion import Expansion
from kancompile.ir.polynomial import PolynomialExpansion
from kancompile.ir.program import PassChange, Program
from kancompile.ir.table import TableExpansion


def with_history(name: str, before: Program, after: Program) -> Program:
    """Return ``after``, made from ``before`` by the pass of that name, with a line about it in its history."""
    old, new = node_texts(before), node_texts(after)
    nodes = [*old, *(node for node in new if node not in old)]
    changes = tuple((node, old.get(node), new.get(node)) for node in nodes if old.get(node) != new.get(node))
    notes = after.notes[len(before.notes) :]
    return replace(after, history=(*before.history, PassChange(name, changes, notes)))


def node_texts(program: Program) -> dict[str, str]:
    """Describe every operation, without its inputs, by the name of its node."""
    texts = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            texts[node.name] = _describe(program.module(node.target))
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


def _describe(module: nn.Module) -> str:
    if isinstance(module, Expansion):
        parts = " | ".join(f"{branch.name}:{branch.k}" for branch in module.branches)
        return f"expand[{'x'.join(map(str, module.in_shape))} -> {module.k}: {parts}]"
    if isinstance(module, TableExpansion):
        index = module.index
        return (
            f"expand[{'x'.join(map(str, module.in_shape))} -> {module.k}: {module.n_tables} table(s) of "
            f"{index.levels} rows, {index.low:.6g} ... {index.high:.6g}, reads {module.input}]"
        )
    if isinstance(module, PolynomialExpansion):
        parts = " | ".join(f"{name}:{k}" for name, k in zip(module.branch_names, module.branch_sizes, strict=True))
        return (
            f"expand[{'x'.join(map(str, module.in_shape))} -> {module.k}: {parts}, degree {module.degree}, "
            f"{module.n_tables} table(s) of {module.cells.rows} cells]"
        )
    if isinstance(module, Contraction):
        return f"contract[{module.weight.shape[1]} -> {module.n_out}: float]"
    if isinstance(module, ConvContraction | QuantizedConvContraction):
        return f"convolve[{_describe_convolution(module)}]"
    if isinstance(module, QuantizedContraction):
        to = "real" if module.output is None else f"index of {module.output.levels}"
        return (
            f"contract[{sum(module.group_sizes)} -> {module.n_out}: {module.weight_bits} bit, "
            f"{len(module.group_sizes)} group(s), to {to}]"
        )
    return type(module).__name__


def _describe_convolution(module: ConvContraction | QuantizedConvContraction) -> str:
    geometry = module.geometry
    kernel = "x".join(map(str, module.kernel))
    size = f"{module.weight.shape[1] * geometry.groups} -> {'x'.join(map(str, module.out_shape))}: {kernel}"
    moves = f"stride {geometry.stride}, padding {geometry.padding}, dilation {geometry.dilation}, {geometry.groups} group(s)"
    if isinstance(module, ConvContraction):
        return f"{size}, {moves}, float"
    to = "unrounded" if module.output is None else f"{module.hands_over} of {module.output.levels}"
    return f"{size}, {moves}, {module.weight_bits} bit, to {to}"
