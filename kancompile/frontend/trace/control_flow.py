"""Write ``torch.while_loop`` and ``torch.cond`` as plain operators, so that KAN layers inside them are found.

    while_loop(i < 5, body, (0, h))    ->    body(body(body(body(body(h)))))
    cond(p, f, g, h)                   ->    where(p, f(h), g(h)),  or the branch that runs where p is a constant

A layer that a loop calls n times is one layer in the file, as if ``for`` had been written. A loop whose number of steps depends
on the samples has no such form and stays one operator with its body, in float.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from kancompile.errors import KanCompileError
from kancompile.frontend.trace.held_state import held_state
from kancompile.frontend.trace.source_lines import node_source

_COND, _WHILE_LOOP = torch.ops.higher_order.cond, torch.ops.higher_order.while_loop
_BOTH = (_COND, _WHILE_LOOP)
_MOST_STEPS = 1024


def inline_control_flow(program: ExportedProgram) -> None:
    """Replace loops and choices by what they compute, in place; those inside others as well.

    A loop whose number of steps the samples decide stays as it is.

    Raises:
        KanCompileError: a loop of very many steps, or a choice by a size of the samples.
    """
    signature = program.graph_signature
    if _write_out(program.graph_module, held_state(program), signature.replace_all_uses):
        program.graph_module.recompile()


def _write_out(module: fx.GraphModule, held: Mapping[str, Any], renamed: Callable[[str, str], None]) -> bool:
    """Write out what can be of a graph, and say whether anything changed.

    Args:
        module: the program, or the part of a loop.
        held: keys and values of the parameters and constants that placeholders stand for.
        renamed: told of values that others take the place of.
    """
    inlining = _Inlining(module, held, renamed)
    kept: set[fx.Node] = set()
    changed = False
    while (node := next((n for n in module.graph.nodes if n.target in _BOTH and n not in kept), None)) is not None:
        with module.graph.inserting_before(node):
            values = inlining.chosen(node) if node.target is _COND else inlining.unrolled(node)
        if values is None:
            kept.add(node)
        else:
            inlining.replace(node, values)
        changed = True
    if changed:
        module.graph.eliminate_dead_code()
        for node in kept:
            _inline_parts(module, node)
        read = {str(node.target).partition(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in module.named_children() if name not in read]:
            delattr(module, name)
    return changed


def _inline_parts(module: fx.GraphModule, loop: fx.Node) -> None:
    """Write out what the condition and the body of a loop that stays hold."""
    for reference in loop.args[:2]:
        name = str(reference.target)  # type: ignore[union-attr]
        part = copy.deepcopy(getattr(module, name))  # an exported program of the user's may hold it, too
        if _write_out(part, {}, lambda old, new: None):
            part.recompile()
            setattr(module, name, part)
        if any(node.target in _BOTH for node in part.graph.nodes):
            raise KanCompileError(
                f"{node_source(loop)}: found torch.while_loop within torch.while_loop, the steps of both decided by the "
                "samples, expected one; give the inner one a fixed number of steps, and let torch.where keep what is finished"
            )


class _Inlining:
    """Puts the graphs of branches and bodies into the graph that calls them."""

    def __init__(self, module: fx.GraphModule, held: Mapping[str, Any], renamed: Callable[[str, str], None]) -> None:
        self.module, self.graph, self._held, self._renamed = module, module.graph, held, renamed
        self._known: dict[fx.Node, Any] = {}  # values of constants, None for other nodes
        self._modules = {  # that hold constants; nodes of a part do not say which module they belong to
            node: self._held[node.name][0].split(".")[:-1] for node in self.graph.nodes if node.name in self._held
        }

    def chosen(self, node: fx.Node) -> list[Any]:
        """Write a choice: its branch where that is known, else both."""
        arguments: Any = node.args
        predicate, yes, no, operands = arguments
        value = self._value(predicate)
        if value is not None:
            return self._inlined(yes if bool(value) else no, operands)
        if not isinstance(predicate, fx.Node) or not isinstance(predicate.meta["val"], Tensor):
            raise KanCompileError(
                f"{node_source(node)}: found torch.cond on a size of the samples, expected a tensor; write the branch that "
                "the compiled sizes take"
            )
        branches = [self._inlined(branch, operands) for branch in (yes, no)]
        return [
            a if a is b else self.graph.call_function(torch.ops.aten.where.self, (predicate, a, b))
            for a, b in zip(*branches, strict=True)
        ]

    def unrolled(self, node: fx.Node) -> list[Any] | None:
        """Write the steps of a loop; ``None`` where the samples decide how many there are."""
        arguments: Any = node.args
        condition, body, carried, others = arguments
        values = list(carried)
        for _ in range(_MOST_STEPS):
            (going,) = self._inlined(condition, [*values, *others])
            value = self._value(going)
            if value is None:
                return None
            if not bool(value):
                return values
            values = self._inlined(body, [*values, *others])
        raise KanCompileError(
            f"{node_source(node)}: found torch.while_loop of more than {_MOST_STEPS} steps, expected fewer; take larger steps"
        )

    def replace(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Let what reads the results of a node read values."""
        for read in list(node.users):
            value = values[read.args[1]]  # type: ignore[index]
            if "val" not in value.meta:
                value.meta = dict(read.meta)
            read.replace_all_uses_with(value)
            self._renamed(read.name, value.name)
            self.graph.erase_node(read)
        self.graph.erase_node(node)

    def _inlined(self, reference: Any, inputs: Sequence[Any]) -> list[Any]:
        """Copy the nodes of a part's graph, which reads inputs; returns what it returns."""
        part: Any = getattr(self.module, reference.target)
        given = iter(inputs)
        own: dict[fx.Node, Any] = {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                own[node] = next(given)
            elif node.op == "get_attr":
                own[node] = self.graph.get_attr(self._adopted(getattr(part, node.target), node.target))
            elif node.op == "output":
                returned = node.args[0]
                returned = returned if isinstance(returned, list | tuple) else [returned]
                return [own.get(value, value) for value in returned]
            else:
                own[node] = self._with_module(self.graph.node_copy(node, own.__getitem__))
        raise AssertionError("a graph ends with its output")

    def _with_module(self, node: fx.Node) -> fx.Node:
        """Say that a node belongs to the module that holds the constants which it reads."""
        read = [self._modules[source] for source in node.all_input_nodes if source in self._modules]
        if read:
            same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*read, strict=False))
            shared = [parts[0] for parts in same]
            if len(read) == len(node.all_input_nodes):
                self._modules[node] = shared
            node.meta["nn_module_stack"] = {"part": (".".join(shared), "")}
        return node

    def _adopted(self, part: Any, name: str) -> str:
        """Keep a part of a part, such as the body of a loop within a loop, with the program."""
        free = next(f"{name}_{number}" for number in itertools.count() if not hasattr(self.module, f"{name}_{number}"))
        setattr(self.module, free, part)
        return free

    def _value(self, given: Any) -> Any:
        """Give the value of a constant, ``None`` for what depends on the samples."""
        if not isinstance(given, fx.Node):
            return given
        if given not in self._known:
            self._known[given] = self._evaluated(given)
        return self._known[given]

    def _evaluated(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._held.get(node.name, ("", None))[1]
        is_plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if not is_plain or any(self._value(source) is None for source in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
