"""The intermediate representation: an FX graph whose KAN layers are expansion and contraction modules.

A :class:`Program` is a value. Beside it stand the three functions that give it a meaning: calling it evaluates,
:func:`check` verifies its invariants (the pipeline does so after every pass) and :func:`show` prints it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kancompile.convolutions import ConvContraction, QuantizedConvContraction
from kancompile.errors import KanCompileError
from kancompile.modules import Contraction, Expansion, QuantizedContraction, TableExpansion
from kancompile.polynomials import PolynomialExpansion

KAN_MODULES = (
    Contraction,
    ConvContraction,
    Expansion,
    PolynomialExpansion,
    QuantizedContraction,
    QuantizedConvContraction,
    TableExpansion,
)
INTEGER_CONTRACTIONS = (QuantizedContraction, QuantizedConvContraction)
CONTRACTIONS = (Contraction, ConvContraction, *INTEGER_CONTRACTIONS)

_CHUNK = 128


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
class PassChange:
    """What one pass did to a program.

    Attributes:
        name: of the pass.
        changes: ``(node, before, after)`` for every node whose description changed; ``None`` where it is absent.
        notes: lines that the pass added.
    """

    name: str
    changes: tuple[tuple[str, str | None, str | None], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One KAN layer of a program: the names under which its modules stand in the graph."""

    name: str
    contraction: str
    expansions: tuple[str, ...]

    def origin(self, lowered: str) -> str:
        """Return the expansion of this layer that a lowered one comes from; passes that divide one append to its name.

        Raises:
            KanCompileError: it comes from none.
        """
        found = [name for name in self.expansions if lowered == name or lowered.startswith(f"{name}_")]
        if not found:
            raise KanCompileError(
                f"layer {self.name!r}: found expansion {lowered!r}, expected parts of {self.expansions!r}"
            )
        return max(found, key=len)


@dataclass(frozen=True)
class Program:
    """A captured network.

    Attributes:
        graph_module: FX graph module; KAN layers are ``call_module`` nodes of the classes in ``kancompile.modules``,
            everything else stays ATen.
        input_shape: shape of the input without the batch.
        unrecognized: what was looked at and left alone.
        notes: lines for the report that passes added.
        history: what each pass did, in order.
    """

    graph_module: fx.GraphModule
    input_shape: tuple[int, ...]
    unrecognized: tuple[Unrecognized, ...] = ()
    notes: tuple[str, ...] = field(default=())
    history: tuple[PassChange, ...] = field(default=())

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
                if isinstance(module, CONTRACTIONS):
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
        """Evaluate, as far as needed, and keep the inputs and the output of the named modules.

        Returns:
            for each target the tuple of its input tensors and its output.
        """
        recorder = _Recorder(self.graph_module, frozenset(targets))
        with torch.no_grad(), contextlib.suppress(_AllKept):
            recorder.run(x)
        return recorder.kept

    def inputs(self, x: Tensor, targets: Iterable[str]) -> dict[str, Tensor]:
        """Evaluate in chunks of bounded memory and keep what the named modules, each of one input, read.

        Returns:
            for each target its input for all of ``x``.
        """
        wanted = list(targets)
        kept: dict[str, list[Tensor]] = {target: [] for target in wanted}
        for part in torch.split(x, _CHUNK):
            for target, (arguments, _) in self.trace(part, wanted).items():
                kept[target].append(arguments[0])
        return {target: torch.cat(parts) for target, parts in kept.items()}


class _AllKept(Exception):
    pass


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, targets: frozenset[str]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.targets = targets
        self.kept: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        if target in self.targets:
            self.kept[target] = (args, result)
            if len(self.kept) == len(self.targets):
                raise _AllKept
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
            if not isinstance(expansion, Expansion | PolynomialExpansion | TableExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: contraction reads {target!r} of type {type(expansion).__name__}, "
                    "expected an expansion"
                )
            columns += expansion.n_in * expansion.k
            if isinstance(contraction, INTEGER_CONTRACTIONS) and not isinstance(expansion, TableExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: integer contraction reads float expansion {target!r}; "
                    "tabulate it before rounding the weights"
                )
        if isinstance(contraction, Contraction):
            _expect(layer.name, "weight columns", contraction.weight.shape[1], columns)
            _expect(layer.name, "bias length", contraction.bias.numel(), contraction.n_out)
            _expect_finite(layer.name, "weight", contraction.weight)
        if isinstance(contraction, QuantizedContraction):
            _expect(layer.name, "grouped columns", sum(contraction.group_sizes), columns)
            for codes, scale in zip(contraction.weights, contraction.scales, strict=True):
                _expect(layer.name, "scales", scale.numel(), contraction.n_out)
                _check_codes(layer.name, codes, scale, contraction.product_bits)
            if contraction.multiplier is not None:
                factors = contraction.multiplier.of_column()
                _expect(layer.name, "weights that are no multiple", int((contraction.weights[0] % factors).any()), 0)
                narrow = contraction.weights[0] // factors
                _check_codes(layer.name, narrow, contraction.scales[0], contraction.weight_bits)
        if isinstance(contraction, ConvContraction | QuantizedConvContraction):
            _check_convolution(program, layer, contraction, columns)


def _check_codes(layer: str, codes: Tensor, scale: Tensor, bits: int) -> None:
    limit = 1 << (bits - 1)
    _expect_finite(layer, "scale", scale)
    low, high = int(codes.min()), int(codes.max())
    if low < -limit or high >= limit:
        raise KanCompileError(f"layer {layer!r}: weight codes {low} ... {high} do not fit {bits} bits")


def _check_convolution(
    program: Program, layer: Layer, contraction: ConvContraction | QuantizedConvContraction, columns: int
) -> None:
    geometry, name = contraction.geometry, layer.name
    _expect(name, "weight columns of a group", contraction.weight.shape[1], columns // geometry.groups)
    _expect(name, "output channels left over by the groups", contraction.n_out % geometry.groups, 0)
    _expect(name, "bias length", contraction.bias.numel(), contraction.n_out)
    for target in layer.expansions:
        expansion = program.module(target)
        assert isinstance(expansion, Expansion | PolynomialExpansion | TableExpansion)
        _expect(name, "input channels left over by the groups", expansion.n_in % geometry.groups, 0)
        _expect(name, "spatial dimensions", len(expansion.in_shape) - 1, len(contraction.kernel))
        out_shape = (contraction.n_out, *geometry.out_size(expansion.in_shape[:-1], contraction.kernel))
        if out_shape != contraction.out_shape:
            raise KanCompileError(
                f"layer {name!r}: found output shape {contraction.out_shape!r}, expected {out_shape!r} for an input of "
                f"{expansion.in_shape!r} (channels last)"
            )
    if isinstance(contraction, QuantizedConvContraction):
        _expect(name, "scales", contraction.scale.numel(), contraction.n_out)
        _check_codes(name, contraction.weight, contraction.scale, contraction.weight_bits)
        if contraction.output is not None:
            _expect(name, "levels above 256 in the output", max(0, contraction.output.levels - 256), 0)
    else:
        _expect_finite(name, "weight", contraction.weight)


def _expect(layer: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise KanCompileError(f"layer {layer!r}: found {found} {what}, expected {expected}")


def _expect_finite(layer: str, what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise KanCompileError(f"layer {layer!r}: {what} has NaN or infinite values; retrain or repair the checkpoint")


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
