"""Build the program's graph: canonical layers as modules, everything else as it was exported."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from kancompile.frontend.flow import Flow, GraphCopier, emit_image, is_fixed, layout_of, live_nodes
from kancompile.frontend.layers import CanonicalLayer
from kancompile.ir import RECURRENCES

Targets = dict[str, tuple[fx.Node, bool]]


def rewrite(flow: Flow, layers: Sequence[CanonicalLayer]) -> tuple[fx.GraphModule, Targets]:
    """Replace each layer's target by ``call_module`` nodes and drop what only fed it.

    Modules are named ``layer0_expand0``, ``layer0_contract`` and so on; parameters that are still read keep the name of
    their placeholder.

    Returns:
        the module, and by the name of the node that yields a target that target, and whether it is whole images, not samples.
    """
    layer_of = {layer.region.target: (number, layer) for number, layer in enumerate(layers)}
    copier = GraphCopier(flow)
    graph = copier.graph
    for node in flow.inputs:
        copier.placed[node] = graph.placeholder("x" if len(flow.inputs) == 1 else node.name)
    for symbol, (holder, dim, times) in flow.symbols.items():
        size = graph.call_function(torch.ops.aten.sym_size.int, (copier.placed[holder], dim))
        copier.sizes[symbol] = size if times == 1 else graph.call_function(operator.floordiv, (size, times))
    modules: dict[str, nn.Module] = {}
    targets: Targets = {}
    in_samples: dict[fx.Node, fx.Node] = {}  # targets as [b, *shape of one sample]
    live = live_nodes(flow.outputs)
    for node in flow.graph.nodes:
        if node not in live or node in flow.inputs:
            continue
        if node in flow.parameter_of:
            copier.place_constant(node, node.name)
        elif is_fixed(flow, node) and any(reader.target in RECURRENCES.values() for reader in node.users):
            copier.place_constant(node, node.name)  # weights, which they read in another order than the user's
        elif node in layer_of:
            number, layer = layer_of[node]
            features = []
            for position, (anchor, expansion) in enumerate(zip(layer.anchors, layer.expansions, strict=True)):
                name = f"layer{number}_expand{position}"
                modules[name] = expansion
                layout, selection = layout_of(anchor, flow.batch), layer.selections[position]
                called = f"layer{number}_inputs{position}"
                source: fx.Node | None
                if layer.pixel is not None:
                    source, shape = emit_image(graph, copier.placed[anchor], layout), layer.pixel
                    shape = shape if selection is None else (selection.size, *shape)
                else:
                    source, shape = in_samples.get(anchor), layout.shape
                    if source is None:
                        source = layout.emit_to_samples(graph, copier.placed[anchor], copier.sizes)
                if selection is not None:
                    source = selection.emit(copier, source, shape, called)
                features.append(graph.call_module(name, (source,)))
            modules[f"layer{number}_contract"] = layer.contraction
            result = layer.emit_moved(copier, graph.call_module(f"layer{number}_contract", tuple(features)))
            targets[result.name] = node, layer.any_size
            if layer.any_size:
                copier.placed[node] = result
                continue
            in_samples[node] = result
            copier.placed[node] = layout_of(node, flow.batch).emit_from_samples(graph, result, copier.sizes)
        else:
            copier.copy(node)
    returned = tuple(copier.placed[node] for node in flow.outputs)
    copier.finish(returned if len(returned) > 1 else returned[0])
    return fx.GraphModule({**copier.root, **modules}, graph), targets
