"""Give every branch of an expansion a table of its own.

    phi = expand[spline | base](x)      ->      phi_1 = expand[spline](x); phi_2 = expand[base](x)

Then each branch has its own index (a spline whose support is a small part of the input range gets rows only there) and
its own weight scale, at the price of one more lookup for every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kancompile.ir import Contraction, Expansion, Layer, Program, nodes_of


@dataclass(frozen=True)
class SplitBranches:
    """Split the expansions of the chosen layers; expansions of one branch stay, and those of convolutions.

    A convolution has one weight scale for each output channel, whatever its expansions.

    Attributes:
        applies: whether to split a layer, by its name.
    """

    applies: Callable[[str], bool]

    name = "split-branches"

    def __call__(self, program: Program) -> Program:
        """Return the program with one expansion for every branch."""
        for layer in program.layers():
            is_linear = program.is_float(layer) and program.contraction(layer).geometry is None
            if (
                is_linear
                and self.applies(layer.name)
                and any(_branches(program, target) > 1 for target in layer.expansions)
            ):
                program = _split(program, layer)
        return program


def _branches(program: Program, target: str) -> int:
    module = program.module(target)
    return len(module.branches) if isinstance(module, Expansion) else 1


def _split(program: Program, layer: Layer) -> Program:
    contraction = program.node(layer.contraction, Contraction)
    copy = program.replace_modules({})
    root, graph = copy.graph_module, copy.graph_module.graph
    parts: dict[str, list[str]] = {}
    order: list[Tensor] = []
    start = 0
    for target, expansion in zip(layer.expansions, program.expansions(layer), strict=True):
        size = expansion.n_in * expansion.k
        columns = torch.arange(start, start + size).reshape(-1, expansion.k)
        start += size
        if not isinstance(expansion, Expansion) or len(expansion.branches) == 1:
            parts[target] = []
            order.append(columns.flatten())
            continue
        parts[target] = [f"{target}_branch{number}" for number in range(len(expansion.branches))]
        done = 0
        for name, branch in zip(parts[target], expansion.branches, strict=True):
            root.add_module(name, Expansion(expansion.anchor_shape, [branch], expansion.channels_first))  # type: ignore[list-item]
            order.append(columns[:, done : done + int(branch.k)].flatten())  # type: ignore[arg-type]
            done += int(branch.k)  # type: ignore[arg-type]
    for reader in nodes_of(copy, layer.contraction):
        sources: list[fx.Node] = []
        for source in reader.all_input_nodes:
            with graph.inserting_before(reader):
                split = [graph.call_module(name, (source.args[0],)) for name in parts[str(source.target)]]
            sources += split or [source]
        reader.args = tuple(sources)
    weight = contraction.weight[:, torch.cat(order)].contiguous()
    root.add_module(layer.contraction, contraction.with_weight(weight))
    graph.eliminate_dead_code()
    root.recompile()
    return copy.with_graph(graph, root)
