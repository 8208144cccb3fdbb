"""The intermediate representation: an FX graph whose KAN layers are expansion and contraction modules.

A :class:`Program` is a value. Beside it stand the three functions that give it a meaning: calling it evaluates,
:func:`check` verifies its invariants (the pipeline does so after every pass) and :func:`show` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kancompile.errors import KanCompileError
from kancompile.modules import Contraction, Expansion, QuantizedContraction, TableExpansion

KAN_MODULES = (Contraction, Expansion, QuantizedContraction, TableExpansion)


@dataclass(frozen=True)
class Unrecognized:
    """A part of the model that stays as PyTorch computes it, and why.

    Attributes:
        node: name of the node in the exported graph.
        operator: ATen operator.
        reason: one clause, lower case.
        source: ``file:line`` in the user's code, empty where unknown.
    """

    node: str
    operator: str
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Layer:
    """One KAN layer of a program: the names under which its modules stand in the graph."""

    name: str
    contraction: str
    expansions: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A captured network.

    Attributes:
        graph_module: FX graph module; KAN layers are ``call_module`` nodes of the classes in ``kancompile.modules``,
            everything else stays ATen.
        input_shape: shape of the input without the batch.
        unrecognized: what was looked at and left alone.
        notes: lines for the report that passes added.
    """

    graph_module: fx.GraphModule
    input_shape: tuple[int, ...]
    unrecognized: tuple[Unrecognized, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __call__(self, x: Tensor) -> Any:
        """Evaluate the program on ``[b, *input_shape]`` without gradients."""
        with torch.no_grad():
            return self.graph_module(x)

    def module(self, target: str) -> nn.Module:
        """Return the module of that name."""
        return self.graph_module.get_submodule(target)

    def layers(self) -> list[Layer]:
        """List the KAN layers in the order of evaluation."""
        found = []
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                module = self.module(node.target)
                if isinstance(module, Contraction | QuantizedContraction):
                    sources = tuple(str(source.target) for source in node.all_input_nodes)
                    found.append(Layer(module.layer, str(node.target), sources))
        return found

    def replace_modules(self, modules: Mapping[str, nn.Module], notes: Iterable[str] = ()) -> Program:
        """Return a program in which some modules are exchanged; this one stays as it was."""
        root: dict[str, Any] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                root[node.target] = modules.get(node.target, self.module(node.target))
            elif node.op == "get_attr":
                root[node.target] = _attribute(self.graph_module, node.target)
        graph = fx.Graph()
        output = graph.graph_copy(self.graph_module.graph, {})
        graph.output(output)
        return replace(self, graph_module=fx.GraphModule(root, graph), notes=(*self.notes, *notes))

    def trace(self, x: Tensor, targets: Iterable[str]) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """Evaluate and keep the inputs and the output of the named modules.

        Returns:
            for each target the tuple of its input tensors and its output.
        """
        recorder = _Recorder(self.graph_module, frozenset(targets))
        with torch.no_grad():
            recorder.run(x)
        return recorder.kept


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, targets: frozenset[str]) -> None:
        super().__init__(module)
        self.targets = targets
        self.kept: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        if target in self.targets:
            self.kept[target] = (args, result)
        return result


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def check(program: Program) -> None:
    """Verify the invariants that every pass must leave intact.

    Raises:
        KanCompileError: a KAN module reads something else than its kind allows, or sizes do not agree.
    """
    graph = program.graph_module.graph
    graph.lint()
    for layer in program.layers():
        contraction = program.module(layer.contraction)
        columns = 0
        for target in layer.expansions:
            expansion = program.module(target)
            if not isinstance(expansion, Expansion | TableExpansion) and not hasattr(expansion, "in_shape"):
                raise KanCompileError(
                    f"layer {layer.name!r}: contraction reads {target!r} of type {type(expansion).__name__}, "
                    "expected an expansion"
                )
            columns += int(expansion.n_in) * int(expansion.k)  # type: ignore[arg-type]
            if isinstance(contraction, QuantizedContraction) and not isinstance(expansion, TableExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: integer contraction reads float expansion {target!r}; "
                    "tabulate it before rounding the weights"
                )
        if isinstance(contraction, Contraction):
            _expect(layer.name, "weight columns", contraction.weight.shape[1], columns)
            _expect(layer.name, "bias length", contraction.bias.numel(), contraction.n_out)
            _expect_finite(layer.name, "weight", contraction.weight)
        if isinstance(contraction, QuantizedContraction):
            _check_codes(layer.name, contraction, columns)


def _check_codes(layer: str, contraction: QuantizedContraction, columns: int) -> None:
    _expect(layer, "grouped columns", sum(contraction.group_sizes), columns)
    limit = 1 << (contraction.weight_bits - 1)
    for codes, scale in zip(contraction.weights, contraction.scales, strict=True):
        _expect(layer, "scales", scale.numel(), contraction.n_out)
        _expect_finite(layer, "scale", scale)
        low, high = int(codes.min()), int(codes.max())
        if low < -limit or high >= limit:
            raise KanCompileError(
                f"layer {layer!r}: weight codes {low} ... {high} do not fit {contraction.weight_bits} bits"
            )


def _expect(layer: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise KanCompileError(f"layer {layer!r}: found {found} {what}, expected {expected}")


def _expect_finite(layer: str, what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise KanCompileError(f"layer {layer!r}: {what} has NaN or infinite values; retrain or repair the checkpoint")


def show(program: Program) -> str:
    """Print a program for people and golden tests, one line for each node."""
    lines = [f"program(input [b, {', '.join(map(str, program.input_shape))}])"]
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            detail = _describe(program.module(node.target))
        elif node.op == "call_function":
            detail = str(node.target)
        elif node.op == "output":
            lines.append(f"  return {_names(node.all_input_nodes)}")
            continue
        else:
            continue
        lines.append(f"  {node.name} = {detail}({_names(node.all_input_nodes)})")
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
    if isinstance(module, Contraction):
        return f"contract[{module.weight.shape[1]} -> {module.n_out}: float]"
    if isinstance(module, QuantizedContraction):
        to = "real" if module.output is None else f"index of {module.output.levels}"
        return (
            f"contract[{sum(module.group_sizes)} -> {module.n_out}: {module.weight_bits} bit, "
            f"{len(module.group_sizes)} group(s), to {to}]"
        )
    return type(module).__name__
