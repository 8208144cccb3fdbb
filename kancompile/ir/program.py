"""The intermediate representation: an FX graph whose KAN layers are expansion and contraction modules.

A :class:`Program` is a value. Beside it stand the three functions that give it a meaning: calling it evaluates,
:func:`check` verifies its invariants (the pipeline does so after every pass) and :func:`show` prints it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from kancompile.errors import KanCompileError
from kancompile.ir.contraction import AnyContraction, Contraction
from kancompile.ir.expansion import AnyExpansion
from kancompile.ir.named_tensors import NamedTensors, Values, tensors_of
from kancompile.ir.table import TableExpansion
from kancompile.processes import dealt

Kind = TypeVar("Kind", bound=nn.Module)

_CHUNK = 128
ORDINARY = "ordinary"
"""Kind of a linear layer or convolution that is none of the KAN layers."""


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
    """One KAN layer of a program: the names under which its modules stand in the graph, and how many nodes call each."""

    name: str
    contraction: str
    expansions: tuple[str, ...]
    uses: int = 1

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
class Input:
    """One input of a network.

    Attributes:
        name: as the user's ``forward`` calls it; parts of a dict, dataclass or tuple as ``batch.x``.
        shape: without the batch.
        dtype: float32, or an integer type or bool, whose values the network reads as they are.
        dynamic: names of its dynamic dimensions beside the batch, by number in ``[batch, *shape]``; ``shape`` has the sizes of
            the samples there.
        other: another size that the network takes in each of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dynamic: Mapping[int, str] = field(default_factory=dict)
    other: Mapping[int, int] = field(default_factory=dict)

    def resized(self, value: Tensor) -> Tensor:
        """Cut or repeat a value along dynamic dimensions to their other sizes."""
        for dim, size in self.other.items():
            copies = -(-size // value.shape[dim])
            value = torch.cat([value] * copies, dim).narrow(dim, 0, size)
        return value

    def text(self) -> str:
        """Write its shape for people."""
        sizes = [self.dynamic.get(dim, str(size)) for dim, size in enumerate(self.shape, start=1)]
        return f"{self.name} [{', '.join(['batch', *sizes])}]"


@dataclass(frozen=True)
class Interface:
    """What a network takes and gives, in order; one input and one output alone are called ``input`` and ``output``.

    Attributes:
        inputs: of the network.
        outputs: their names.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...] = ("output",)

    def resized(self, x: Values) -> Values:
        """Bring inputs to the other sizes of dynamic dimensions."""
        made = {entry.name: entry.resized(value) for entry, value in zip(self.inputs, tensors_of(x), strict=True)}
        return next(iter(made.values())) if isinstance(x, Tensor) else NamedTensors(made)


@dataclass(frozen=True)
class Program:
    """A captured network.

    Attributes:
        graph_module: FX graph module; KAN layers are ``call_module`` nodes of the classes in ``kancompile.ir.contraction``,
            everything else stays ATen. A layer that is used several times is one module, called by several nodes.
        input_shape: shape of the input without the batch; of several the first.
        unrecognized: what was looked at and left alone.
        sources: ``file:line`` in the user's code of layers, by their names, where it is known.
        kinds: what layers are, by their names, that are no KAN layers: ``ordinary``.
        notes: lines for the report that passes added.
        history: what each pass did, in order.
        declared: inputs and outputs where there are several, others than float32, or dynamic dimensions.
    """

    graph_module: fx.GraphModule
    input_shape: tuple[int, ...]
    unrecognized: tuple[Unrecognized, ...] = ()
    notes: tuple[str, ...] = field(default=())
    history: tuple[PassChange, ...] = field(default=())
    sources: Mapping[str, str] = field(default_factory=dict)
    declared: Interface | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = [layer.name for layer in self.layers()]
        more = f" ... {names[-1]}" if len(names) > 4 else ""
        return f"Program of {len(names)} layers: {', '.join(names[:4])}{more}; kancompile.show prints it"

    def __call__(self, x: Values) -> Any:
        """Evaluate the program without gradients: a tensor for one output, ``NamedTensors`` for several.

        Args:
            x: ``[b, *input_shape]``, several inputs by name.
        """
        with torch.no_grad():
            return self.by_name(self.graph_module(*self.arguments(x)))

    def arguments(self, x: Values) -> tuple[Tensor, ...]:
        """Give inputs in the order in which the graph module takes them."""
        if isinstance(x, Tensor):
            return (x,)
        return tuple(x.tensors[entry.name] for entry in self.interface.inputs)

    def zeros(self, rows: int) -> Values:
        """Give a batch of zeros of the shapes and types of the inputs."""
        found = {one.name: torch.zeros(rows, *one.shape, dtype=one.dtype) for one in self.interface.inputs}
        return NamedTensors(found) if len(found) > 1 else next(iter(found.values()))

    def by_name(self, returned: Any) -> Any:
        """Name what the graph module returns: a tensor stays itself, several become ``NamedTensors``."""
        if not isinstance(returned, tuple):
            return returned
        return NamedTensors(dict(zip(self.interface.outputs, returned, strict=True)))

    @property
    def interface(self) -> Interface:
        """Inputs and outputs."""
        return self.declared or Interface((Input("input", self.input_shape),))

    def module(self, target: str) -> nn.Module:
        """Return the module of that name."""
        return self.graph_module.get_submodule(target)

    def node(self, target: str, kind: type[Kind]) -> Kind:
        """Return the module of that name, of the kind that a pass or a target asks for.

        Raises:
            KanCompileError: it is of another kind.
        """
        module = self.module(target)
        if not isinstance(module, kind):
            raise KanCompileError(f"{target!r}: found a {type(module).__name__}, expected a {kind.__name__} here")
        return module

    def layer(self, name: str) -> Layer:
        """Return the layer of that name.

        Raises:
            KanCompileError: there is none.
        """
        for layer in self.layers():
            if layer.name == name:
                return layer
        raise KanCompileError(f"layer {name!r}: not found, the program has {[layer.name for layer in self.layers()]!r}")

    def contraction(self, layer: Layer) -> AnyContraction:
        """Return the contraction of a layer."""
        return self.node(layer.contraction, AnyContraction)

    def is_float(self, layer: Layer) -> bool:
        """Whether a layer has real weights, rounded to 16 bits or not."""
        return isinstance(self.module(layer.contraction), Contraction)

    def expansions(self, layer: Layer) -> list[AnyExpansion]:
        """Return the expansions that a layer reads, in order."""
        return [self.node(target, AnyExpansion) for target in layer.expansions]

    def tables(self, layer: Layer) -> dict[str, TableExpansion]:
        """Return by their names those expansions of a layer that are tables."""
        found = {target: self.module(target) for target in layer.expansions}
        return {target: module for target, module in found.items() if isinstance(module, TableExpansion)}

    def nodes(self, kind: type[Kind]) -> Iterator[tuple[fx.Node, Kind]]:
        """Yield the nodes that call a module of a kind, with the module, in the order of evaluation."""
        for node in self.graph_module.graph.nodes:
            module = self.module(node.target) if node.op == "call_module" else None
            if isinstance(module, kind):
                yield node, module

    def calls(self) -> dict[str, list[fx.Node]]:
        """Return for every module the nodes that call it, in the order of evaluation."""
        found: dict[str, list[fx.Node]] = {}
        for node, _ in self.nodes(nn.Module):
            found.setdefault(str(node.target), []).append(node)
        return found

    def layers(self) -> list[Layer]:
        """List the KAN layers in the order of evaluation, each once."""
        calls = self.calls()
        return [
            Layer(contraction.layer, target, tuple(str(s.target) for s in node.all_input_nodes), len(calls[target]))
            for node, contraction in self.nodes(AnyContraction)
            if calls[target := str(node.target)][0] is node
        ]

    def replace_modules(self, modules: Mapping[str, nn.Module], notes: Iterable[str] = ()) -> Program:
        """Return a program in which some modules are exchanged; this one stays as it was."""
        graph = fx.Graph()
        output = graph.graph_copy(self.graph_module.graph, {})
        graph.output(output)
        root = named_by(graph, self.graph_module) | dict(modules)
        return replace(self, graph_module=fx.GraphModule(root, graph), notes=(*self.notes, *notes))

    def with_graph(self, graph: fx.Graph, root: nn.Module) -> Program:
        """Return a program of another graph, whose nodes name modules and tensors of ``root``."""
        return replace(self, graph_module=fx.GraphModule(named_by(graph, root), graph))

    def trace(self, x: Values, targets: Iterable[str]) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
        """Evaluate, as far as needed, and keep the inputs and the output of the named modules.

        Returns:
            for each target the tuple of its input tensors and its output, those of further uses behind those of the first.
        """
        calls = self.calls()
        recorder = _Recorder(self.graph_module, {target: len(calls.get(target, ())) for target in targets})
        with torch.no_grad(), contextlib.suppress(_AllKept):
            recorder.run(*self.arguments(x))
        return {target: _one_behind_another(uses) for target, uses in recorder.kept.items()}

    def inputs(self, x: Values, targets: Iterable[str]) -> dict[str, Tensor]:
        """Evaluate in chunks of bounded memory and keep what the named modules, each of one input, read.

        Returns:
            for each target its input for all of ``x``, every chunk as :meth:`trace` gives it.
        """
        wanted = list(targets)

        def read(part: Values) -> tuple[Tensor, ...]:
            traced = self.trace(part, wanted)
            return tuple(traced[target][0][0] for target in wanted)

        parts = zip(*dealt(x.split(_CHUNK), read), strict=True)
        return {target: torch.cat(kept) for target, kept in zip(wanted, parts, strict=True)}


class _AllKept(Exception):
    pass


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, uses: Mapping[str, int]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.uses, self.missing = uses, sum(uses.values())
        self.kept: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(target, args, kwargs)
        if target in self.uses:
            self.kept.setdefault(target, []).append((args, result))
            self.missing -= 1
            if not self.missing:
                raise _AllKept
        return result


def _one_behind_another(uses: list[tuple[tuple[Tensor, ...], Tensor]]) -> tuple[tuple[Tensor, ...], Tensor]:
    if len(uses) == 1:
        return uses[0]
    inputs = zip(*(arguments for arguments, _ in uses), strict=True)
    return tuple(torch.cat(values) for values in inputs), torch.cat([result for _, result in uses])


def named_by(graph: fx.Graph, root: nn.Module) -> dict[str, Any]:
    """Return by their names the modules and tensors of ``root`` that the nodes of a graph name."""
    return {
        str(node.target): attribute(root, str(node.target))
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }


def attribute(module: nn.Module, target: str) -> Any:
    """Return what a ``get_attr`` node names."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
