"""Cut consecutive layers out of a program and hand them to block reconstruction.

What leads up to a block is evaluated once, with the layers before it already rounded; the block itself becomes a small
graph of its own, a function of the weights of its layers and of a sample's number.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import Layer, Program, Values, differentiable, joined, nodes_of
from kancompile.passes.one_thread import in_one_thread
from kancompile.passes.rounding_methods import Block, Brecq, Rounded, RoundingProblem

_CHUNK = 512


def blocks_of(layers: Sequence[Layer], size: int) -> list[list[Layer]]:
    """Divide layers into blocks of ``size``, every layer in exactly one; a single last layer joins the block before it."""
    starts = list(range(0, len(layers), size))
    if len(starts) > 1 and len(layers) % size == 1:
        starts.pop()
    return [list(layers[start:end]) for start, end in itertools.pairwise([*starts, len(layers)])]


def with_one_end(program: Program, block: Sequence[Layer]) -> list[list[Layer]]:
    """Divide a block so that all layers of a part lead up to its last one, whose output is what is reconstructed.

    Layers of parallel branches follow each other as well, and do not feed each other.
    """
    (end,) = nodes_of(program, block[-1].contraction)
    behind, pending = {end}, [end]
    while pending:
        new = [node for node in pending.pop().all_input_nodes if node not in behind]
        behind.update(new)
        pending += new
    targets = {node.target for node in behind}
    apart = [layer for layer in block if layer.contraction not in targets]
    together = [layer for layer in block if layer.contraction in targets]
    return [*(with_one_end(program, apart) if apart else []), together]


@in_one_thread()  # gradients of convolutions are sums over samples
def reconstruct_block(
    program: Program,
    reference: Program,
    stated: Program,
    layers: Sequence[Layer],
    problems: Mapping[str, RoundingProblem],
    rounded: Mapping[str, Rounded],
    x: Values,
    method: Brecq,
    generator: torch.Generator,
) -> dict[str, Rounded]:
    """Improve the rounding of consecutive layers together.

    Args:
        program: the program with all layers up to the block's last rounded (tables as they will ship).
        reference: the program with float weights, whose output at the block's end is the target.
        stated: the same with the float weights and biases that ``problems`` state.
        layers: the block, all of which lead up to the last one.
        problems, rounded: of every layer, by name.
        x: calibration inputs ``[n, *input_shape]``.
        method: options of the reconstruction.
        generator: draws the mini-batches.

    Returns:
        the new rounding of every layer of the block, by name.
    """
    twin = differentiable(program)
    end = layers[-1].contraction
    inside = {name for layer in layers for name in (layer.contraction, *layer.expansions)}
    cut = _Cut(twin, inside, end, _rows_of_samples(twin, x[:1]))
    kept = [_evaluate(twin, cut.frontier, part) for part in x.split(_CHUNK)]
    frontier = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    targets = torch.cat([reference.trace(part, [end])[end][1] for part in x.split(_CHUNK)])
    biases = [stated.contraction(layer).bias for layer in layers]

    def forward(weights: Sequence[Tensor], offsets: Sequence[Tensor], samples: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for layer, weight, offset, bias in zip(layers, weights, offsets, biases, strict=True):
            values[f"{layer.contraction}.weight"] = weight
            values[f"{layer.contraction}.bias"] = bias + offset
        y: Tensor = torch.func.functional_call(cut.module, values, tuple(value[samples] for value in frontier))
        return y

    gradients = _output_gradients(differentiable(reference), end, x, generator)
    block = Block(tuple(problems[layer.name] for layer in layers), forward, torch.arange(len(x)), targets, gradients)
    improved = method.reconstruct(block, [rounded[layer.name] for layer in layers], generator)
    return dict(zip([layer.name for layer in layers], improved, strict=True))


class _Cut:
    """The part of a graph between the layers before a block and the block's last output.

    Its inputs have one row for each sample, so that samples can be picked from them. Sizes, constants and values of another
    shape are computed again.

    Attributes:
        module: graph module from the frontier's values to the block's output.
        frontier: nodes whose values it needs.
    """

    def __init__(self, program: Program, inside: set[str], end: str, by_sample: set[str]) -> None:
        graph = program.graph_module.graph
        depends: set[fx.Node] = set()
        for node in graph.nodes:
            if node.target in inside or any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        (last,) = nodes_of(program, end)
        self.frontier: list[fx.Node] = []
        root: dict[str, Any] = {}
        new = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node in copies:
                return copies[node]
            if node in depends or node.name not in by_sample:
                for source in node.all_input_nodes:
                    copy(source)
                copies[node] = new.node_copy(node, lambda source: copies[source])
                if node.op == "call_module":
                    root[str(node.target)] = program.module(str(node.target))
                elif node.op == "get_attr":
                    root[str(node.target)] = operator.attrgetter(str(node.target))(program.graph_module)
            else:
                self.frontier.append(node)
                copies[node] = new.placeholder(node.name)
            return copies[node]

        # a graph's placeholders come first, so the frontier is walked before anything is copied
        for node in _frontier(last, depends, by_sample):
            copy(node)
        new.output(copy(last))
        self.module = fx.GraphModule(root, new)


def _frontier(last: fx.Node, depends: set[fx.Node], by_sample: set[str]) -> list[fx.Node]:
    """List the nodes outside of a block whose values it needs, in the order of the graph."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in depends or node.name not in by_sample:
            pending += node.all_input_nodes
        else:
            found.add(node)
    return [node for node in last.graph.nodes if node in found]


def _rows_of_samples(program: Program, x: Values) -> set[str]:
    """Name the nodes whose values have one row for each sample, whatever their number; ``x`` is one sample."""
    names = {node.name for node in program.graph_module.graph.nodes}
    found = set(names)
    for count in (2, 3):
        recorder = _NodeRecorder(program.graph_module, names)
        with torch.no_grad():
            recorder.run(*program.arguments(x[torch.zeros(count, dtype=torch.int64)]))
        values = recorder.kept.items()
        found &= {name for name, value in values if isinstance(value, Tensor) and value.shape[:1] == (count,)}
    return found


def _evaluate(program: Program, nodes: Sequence[fx.Node], x: Values) -> list[Tensor]:
    wanted = {node.name for node in nodes}
    recorder = _NodeRecorder(program.graph_module, wanted)
    with torch.no_grad():
        recorder.run(*program.arguments(x))
    return [recorder.kept[node.name] for node in nodes]


class _NodeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = value
        return value


class _Leaf(fx.Interpreter):
    """Runs a program and makes the output of one module a leaf that gradients stop at."""

    def __init__(self, module: fx.GraphModule, target: str) -> None:
        super().__init__(module)
        self.target, self.leaf = target, torch.empty(0)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_module(target, args, kwargs)
        if target == self.target:
            self.leaf = value = value.detach().requires_grad_(True)
        return value


def _output_gradients(twin: Program, end: str, x: Values, generator: torch.Generator) -> Tensor | None:
    """Estimate how much the network's outputs feel the block's output: ``J^T r`` for random signs ``r``.

    ``E (J^T r)^2`` is the diagonal of ``J^T J``, the Gauss-Newton matrix of the squared error of the outputs, which is
    what the Fisher matrix becomes without labels. ``None`` where the block ends at the output.
    """
    found = []
    for part in x.split(_CHUNK):
        runner = _Leaf(twin.graph_module, end)
        with torch.enable_grad():
            y = joined(twin.by_name(runner.run(*twin.arguments(part))))
            if y is runner.leaf or not y.requires_grad:
                return None
            signs = torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1
            found.append(torch.autograd.grad((y * signs).sum(), runner.leaf)[0])
    return torch.cat(found)
