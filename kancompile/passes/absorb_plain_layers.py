"""Take the ordinary layers between KAN layers into the integer program.

    linear(f(x)), conv(f(x))      ->      contract(expand(x)),   expand: one function f of every input

An ordinary linear layer or convolution *is* an expansion with one function, its activation or the identity, followed by a
contraction. As modules they get the same tables, weight rounding and integer kernels as KAN layers, and hand row numbers to
them. What has no such form stays as PyTorch computes it; :func:`left_in_float` says what and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import ORDINARY, Branch, Contraction, Expansion, Geometry, Program, Unrecognized, Values, attribute
from kancompile.passes.shared_products import split_shared_products

_ATEN = torch.ops.aten
_LONGEST_ACTIVATION = 12
_SIZED = (_ATEN.expand.default, _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
"""Operators that read sizes beside their tensor: those of the samples change how often a parameter stands there, not what."""
_CONTRACTIONS = (_ATEN.addmm.default, _ATEN.mm.default, _ATEN.convolution.default)


@dataclass(frozen=True)
class AbsorbPlainLayers:
    """Absorb every linear layer and convolution with constant weights; the second run changes nothing.

    Attributes:
        wanted: whether a layer of that name is to be absorbed; others stay in float.
    """

    wanted: Callable[[str], bool] = lambda name: True

    name = "absorb-plain-layers"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with ordinary layers as modules, equal in value up to rounding.

        Args:
            program: a captured program.
            x: inputs ``[n, *input_shape]``, of which two are evaluated for the shapes.
        """
        values = _Values(program, x[:2])
        split = split_shared_products(program, values.constant)
        if split is not program:
            program, values = split, _Values(split, x[:2])
        taken = {layer.name for layer in program.layers()}
        found: list[_Use] = []
        owners: dict[Any, list[_Plain]] = {}
        kinds = dict(program.kinds)
        for node in program.graph_module.graph.nodes:
            name = _name(node, taken)
            layer = _plain_layer(node, name, values)
            if layer is None:
                continue
            target, layer = _with_batch_norm(node, layer, values)
            same = owners.setdefault(values.sources[node.args[2 if node.target is _ATEN.addmm.default else 1]], [])
            first = next((other for other in same if _is_same(other, layer)), layer)
            if first is layer and self.wanted(name):
                taken.add(name)
                kinds[name] = ORDINARY
                same.append(layer)
            if first is not layer or name in taken:
                found.append(_Use(target.name, layer.source, first))
        if not found:
            return program
        return replace(_rewritten(program, found), kinds=kinds)


@dataclass(frozen=True)
class _Plain:
    """One ordinary layer: the node its expansion reads, its activation as a module, and the modules."""

    source: str
    activation: fx.GraphModule | None
    expansion: Expansion
    contraction: Contraction


@dataclass(frozen=True)
class _Use:
    """The node that a layer takes the place of, the one that its expansion reads here, and the layer, of its first use."""

    node: str
    source: str
    layer: _Plain


def _is_same(layer: _Plain, other: _Plain) -> bool:
    """Whether layers of one weight are uses of one layer."""
    a, b = layer.contraction, other.contraction
    return (
        (a.geometry, a.out_shape, layer.expansion.anchor_shape)
        == (b.geometry, b.out_shape, other.expansion.anchor_shape)
        and torch.equal(a.weight, b.weight)
        and torch.equal(a.bias, b.bias)
        and _operators(layer.activation) == _operators(other.activation)
    )


def _operators(activation: fx.GraphModule | None) -> list[Any]:
    """List what an activation applies; it has no constants but numbers."""
    nodes = [] if activation is None else list(activation.graph.nodes)
    number = {node: place for place, node in enumerate(nodes)}
    return [(node.target, fx.map_arg((node.args, node.kwargs), number.__getitem__)) for node in nodes[1:]]


class _Values(fx.Interpreter):
    """The value of every node, and where sizes are dynamic that of inputs of other sizes.

    Attributes:
        sources: the parameters and buffers that a node is computed from alone, ``None`` where it depends on data.
    """

    def __init__(self, program: Program, x: Values, resized: bool = True) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        with torch.no_grad():
            self.run(*program.arguments(x))
        self.sources: dict[Any, frozenset[str] | None] = {}
        for node in program.graph_module.graph.nodes:
            reads = node.all_input_nodes[:1] if node.target in _SIZED else node.all_input_nodes
            read = [self.sources[source] for source in reads]
            known = [names for names in read if names is not None]
            is_constant = node.op in ("get_attr", "call_function") and len(known) == len(read)
            own = {str(node.target)} if node.op == "get_attr" else set()
            self.sources[node] = frozenset(own.union(*known)) if is_constant else None
        self.other = None
        if resized and any(entry.dynamic for entry in program.interface.inputs):
            self.other = _Values(program, program.interface.resized(x), resized=False)

    def of(self, node: fx.Node) -> Any:
        return self.env.get(node)

    def constant(self, node: Any) -> Tensor | None:
        """Give the value of a parameter or buffer, or of what they alone give; ``None`` for what depends on data."""
        if not isinstance(node, fx.Node) or self.sources[node] is None:
            return None
        found = self.of(node)
        return found.detach() if isinstance(found, Tensor) else None

    def pixel(self, node: fx.Node) -> tuple[int, ...]:
        """Give the shape of an image ``[b, channels, *spatial]`` without the batch, dynamic sizes as 1."""
        shape = self.of(node).shape[1:]
        other = shape if self.other is None else self.other.of(node).shape[1:]
        return tuple(size if size == found else 1 for size, found in zip(shape, other, strict=True))


def _plain_layer(node: fx.Node, name: str, values: _Values) -> _Plain | None:
    if node.op != "call_function":
        return None
    if node.target is _ATEN.addmm.default and not node.kwargs:
        return _linear(name, node.args[1], node.args[2], node.args[0], values)
    if node.target is _ATEN.mm.default:
        return _linear(name, node.args[0], node.args[1], None, values)
    if node.target is _ATEN.convolution.default:
        return _convolution(node, name, values)
    return None


def _linear(name: str, x: Any, weight: Any, bias: Any, values: _Values) -> _Plain | None:
    matrix, offset = values.constant(weight), values.constant(bias)
    if matrix is None or (bias is not None and offset is None) or values.constant(x) is not None:
        return None
    inputs = values.of(x)
    if inputs.dtype != torch.float32 or inputs.dim() != 2:
        return None
    source, region = _activation(x, values.of)
    n_in, n_out = matrix.shape
    expansion = Expansion((n_in,), [Branch(source.name, region, torch.arange(n_in)[:, None])])
    bias_values = torch.zeros(n_out) if offset is None else offset.expand(n_out)
    return _Plain(
        source.name, region, expansion, Contraction(name, matrix.T.contiguous().clone(), bias_values.clone(), (n_out,))
    )


def _convolution(node: fx.Node, name: str, values: _Values) -> _Plain | None:
    value = values.of
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    kernel, offset = values.constant(weight), values.constant(bias)
    if kernel is None or transposed or (bias is not None and offset is None) or not isinstance(x, fx.Node):
        return None
    inputs = value(x)
    dims = kernel.dim() - 2
    if inputs.dtype != torch.float32 or inputs.dim() != dims + 2 or values.constant(x) is not None:
        return None
    source, region = _activation(x, value)
    shape = values.pixel(x)
    position = torch.arange(math.prod(shape)).reshape(shape).movedim(0, -1)[..., None]
    sides = [_sides(argument, dims) for argument in (stride, padding, dilation)]
    assert isinstance(groups, int)
    return _Plain(
        source.name,
        region,
        Expansion(shape, [Branch(source.name, region, position.contiguous())], channels_first=True),
        Contraction(
            name,
            kernel.clone(),
            torch.zeros(len(kernel)) if offset is None else offset.clone(),
            tuple(value(node).shape[1:]),
            Geometry(sides[0], sides[1], sides[2], groups),
        ),
    )


def _with_batch_norm(node: fx.Node, layer: _Plain, values: _Values) -> tuple[fx.Node, _Plain]:
    """Fold a batch norm that alone reads a layer, ``W' = W g / s, b' = (b - m) g / s + c``; give the node that is replaced."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not _ATEN._native_batch_norm_legit_no_training.default:
        return node, layer
    norm = users[0]
    results = list(norm.users)
    if len(results) != 1 or results[0].args[1] != 0:
        return node, layer
    gain, shift, mean, variance = (values.constant(norm.args[place]) for place in range(1, 5))
    epsilon = norm.args[6]
    assert isinstance(epsilon, float)
    if mean is None or variance is None:
        return node, layer
    slope = (variance.double() + epsilon).rsqrt() * (1.0 if gain is None else gain.double())
    old = layer.contraction
    weight = (old.weight.double() * slope.reshape(-1, *[1] * (old.weight.dim() - 1))).float()
    bias = ((old.bias.double() - mean.double()) * slope + (0.0 if shift is None else shift.double())).float()
    return results[0], replace(layer, contraction=old.with_weight(weight, bias))


def _sides(argument: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(side) for side in argument)
    return values * dims if len(values) == 1 else values


def _activation(x: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[fx.Node, fx.GraphModule | None]:
    """Follow pointwise functions of one tensor backwards: the tensor, and the functions as a module.

    Only functions that nothing else reads are taken along.
    """
    inside: list[fx.Node] = []
    frontier = {x}
    best: tuple[fx.Node, list[fx.Node]] = (x, [])
    order = {node: place for place, node in enumerate(x.graph.nodes)}
    while len(inside) < _LONGEST_ACTIVATION:
        latest = max(frontier, key=order.__getitem__)
        alone = all(user in inside for user in latest.users) or latest is x
        if not alone or not _is_pointwise(latest, value):
            break
        inside.append(latest)
        frontier.remove(latest)
        frontier.update(latest.all_input_nodes)
        if len(frontier) == 1:
            (source,) = frontier
            best = (source, list(inside))
    source, nodes = best
    if not nodes or (len(x.users) > 1 and x is not source):
        return x, None
    graph = fx.Graph()
    placed = {source: graph.placeholder("x")}
    for node in reversed(nodes):
        placed[node] = graph.node_copy(node, placed.__getitem__)
    graph.output(placed[x])
    return source, fx.GraphModule({}, graph)


def _is_pointwise(node: fx.Node, value: Callable[[fx.Node], Any]) -> bool:
    """Whether a node computes every element from the same element of one or two tensors of its own shape."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    result = value(node)
    sources = [value(source) for source in node.all_input_nodes]
    return bool(sources) and all(
        isinstance(source, Tensor) and source.shape == result.shape and source.dtype == torch.float32
        for source in (*sources, result)
    )


def _name(node: fx.Node, taken: set[str]) -> str:
    """Name a layer by the module that holds its node, in the user's model."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    name = path.removeprefix("L['self']").lstrip(".") or node.name
    candidate, copy = name, 1
    while candidate in taken:
        candidate, copy = f"{name}_{copy}", copy + 1
    return candidate


def _rewritten(program: Program, found: list[_Use]) -> Program:
    """Put modules in the place of nodes, and drop what nothing reads any more."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph_module.graph, copies)
    graph.output(output)
    by_name = {node.name: copy for node, copy in copies.items()}
    root: dict[str, Any] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            root[node.target] = program.module(node.target)
        elif node.op == "get_attr":
            root[node.target] = attribute(program.graph_module, node.target)
    numbers: dict[str, int] = {}
    for use in found:
        node, source, layer = by_name[use.node], by_name[use.source], use.layer
        number = numbers.setdefault(layer.contraction.layer, len(numbers))
        root |= {f"plain{number}_expand0": layer.expansion, f"plain{number}_contract": layer.contraction}
        with graph.inserting_before(node):
            features = graph.call_module(f"plain{number}_expand0", (source,))
            replacement = graph.call_module(f"plain{number}_contract", (features,))
        node.replace_all_uses_with(replacement)
        by_name[use.node] = replacement
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    kept = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
    module = fx.GraphModule({key: entry for key, entry in root.items() if key in kept}, graph)
    names = ", ".join(map(repr, numbers))
    left = any(node.target in _CONTRACTIONS for node in graph.nodes)
    unrecognized = tuple(entry for entry in program.unrecognized if left or not _is_plain(entry))
    notes = (*program.notes, f"ordinary layers in integers: {names}")
    return replace(program, graph_module=module, unrecognized=unrecognized, notes=notes)


def _is_plain(entry: Unrecognized) -> bool:
    return entry.reason.startswith("plain ") or entry.reason.endswith("after a plain activation")
