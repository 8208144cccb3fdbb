"""Cut a part out of the exported graph as a module of its own, ``[b, *shape]`` in and out, at any batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from kancompile.frontend.flow.batch_layout import NotLowerableError, emit_size, layout_of
from kancompile.frontend.flow.flow import Flow
from kancompile.frontend.flow.images import emit_image, emit_tensor, sizes_of_one_row
from kancompile.frontend.flow.verdicts import operator_name

_ATEN = torch.ops.aten
_ASSERTIONS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"})


class GraphCopier:
    """Copy nodes of an exported graph into a new graph, sizes rewritten as functions of the new graph's batch.

    Attributes:
        graph: the new graph.
        placed: node of the new graph for each node already copied or given.
        sizes: what the batch size and dynamic sizes are in the new graph.
        root: tensors that the new graph names in ``get_attr`` nodes.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.graph = fx.Graph()
        self.placed: dict[fx.Node, Any] = {}
        self.sizes: dict[sympy.Symbol, Any] = {}
        self.root: dict[str, Any] = {}

    @property
    def rows(self) -> Any:
        """Number of rows in a reshape, which there gives the rest where rows are more than samples."""
        return -1 if self.flow.dynamic else self.sizes[self.flow.batch]

    def place_constant(self, node: fx.Node, name: str) -> None:
        """Put a node's value into the new graph as a buffer."""
        self.root[name] = self.flow.values[node].detach().clone()
        self.placed[node] = self.graph.get_attr(name)

    def copy(self, node: fx.Node) -> None:
        """Copy one call, whose inputs are placed already."""
        name = operator_name(node)
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.placed[node] = emit_size(self.graph, value.node.expr, self.sizes)
            return
        if name in _ASSERTIONS:
            return
        if node.op == "get_attr":
            self.root[str(node.target)] = self.flow.values[node]
        if node in self.flow.sized and node.all_input_nodes and node.all_input_nodes[0] in self.flow.tracks:
            self._fill(node)
            return
        if name == "copy":
            self._copy_values(node)
            return
        new = self.graph.node_copy(node, self.placed.__getitem__)
        if name in ("view", "_unsafe_view"):  # strides may differ from those that were traced
            new.target = _ATEN.reshape.default
        new.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        self.placed[node] = new

    def finish(self, output: fx.Node | tuple[fx.Node, ...]) -> None:
        """End the graph with its output, or a tuple of several, and drop what the output does not need (all nodes are pure)."""
        self.graph.output(output)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        read = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.root = {name: value for name, value in self.root.items() if name in read}

    def _fill(self, node: fx.Node) -> None:
        """Replace ``full_like`` and the like by a tensor of the same size, so that the tensor it imitates is not needed."""
        value = self.flow.values[node]
        if value.numel() and not bool((value == value.flatten()[0]).all()):
            raise NotLowerableError(f"{node.name} reads the shape of a tensor and is not filled with one value")
        sizes = self._sizes(node)
        fill = value.flatten()[0].item() if value.numel() else 0
        self.placed[node] = self.graph.call_function(_ATEN.full.default, (sizes, fill), {"dtype": value.dtype})

    def _copy_values(self, node: fx.Node) -> None:
        """Replace ``copy(tensor, values)``, which only takes shape and type of the tensor and has no derivative."""
        values = node.args[1]
        assert isinstance(values, fx.Node)
        old, new = values.meta["val"], node.meta["val"]
        placed = self.placed[values]
        if list(map(str, old.shape)) != list(map(str, new.shape)):
            placed = self.graph.call_function(_ATEN.expand.default, (placed, self._sizes(node)))
        if old.dtype != new.dtype:
            placed = self.graph.call_function(_ATEN._to_copy.default, (placed,), {"dtype": new.dtype})
        self.placed[node] = placed

    def _sizes(self, node: fx.Node) -> list[Any]:
        return [
            size if isinstance(size, int) else emit_size(self.graph, size.node.expr, self.sizes)
            for size in node.meta["val"].shape
        ]


def cut_out(
    flow: Flow,
    inputs: Sequence[fx.Node],
    output: fx.Node,
    selection: Selection | None = None,
    *,
    images: bool = False,
) -> fx.GraphModule:
    """Build the module that computes ``output`` from ``inputs``, all as ``[b, *shape of one sample]``.

    Constants that do not depend on the batch size are folded into buffers (copies: the module shares nothing). With a
    selection, the module reads only the selected elements of its one input; the others, on which the output does not
    depend, repeat one of them. With ``images`` dynamic dimensions have the sizes of the example, and the module reads and yields
    ``[b, channels, *spatial]``.

    Raises:
        NotLowerableError: a size or a batch dimension cannot be expressed, or the output needs more than ``inputs``.
    """
    needed = _needed(flow, inputs, output)
    copier = GraphCopier(flow)
    graph = copier.graph
    holders = [graph.placeholder(f"x{position}" if len(inputs) > 1 else "x") for position in range(len(inputs))]
    layouts = [layout_of(node, flow.batch) for node in (*inputs, output)]
    # one row at a time: a dynamic dimension along which a layer is the same everywhere has size 1
    sizes = flow.example_sizes if images else sizes_of_one_row(layouts, flow.dynamic)
    copier.sizes = {flow.batch: graph.call_function(_ATEN.sym_size.int, (holders[0], 0))} | sizes
    for node, holder, layout in zip(inputs, holders, layouts, strict=False):
        if images:
            copier.placed[node] = emit_tensor(graph, holder, layout)
            continue
        if selection is not None:
            holder = selection.emit_spread(copier, holder, layout.shape)
        copier.placed[node] = layout.emit_from_samples(graph, holder, copier.sizes)
    constants = 0
    for node in flow.graph.nodes:
        if node not in needed or node in copier.placed:
            continue
        if is_fixed(flow, node):
            if isinstance(flow.values[node], Tensor):
                copier.place_constant(node, f"constant{constants}")
                constants += 1
            else:
                copier.placed[node] = flow.values[node]
        elif node in flow.constant and flow.differs_along_dynamic(node):
            raise NotLowerableError(f"reads constants that differ along a dynamic dimension ({node.name})")
        elif node.op == "placeholder":
            raise NotLowerableError("adds values that are no functions of the same features")
        else:
            copier.copy(node)
    result = copier.placed[output]
    copier.finish(
        emit_image(graph, result, layouts[-1]) if images else layouts[-1].emit_to_samples(graph, result, copier.sizes)
    )
    return fx.GraphModule(copier.root, graph)


@dataclass(frozen=True)
class Selection:
    """Some of the inputs ``[b, *lead, n]`` of a layer, where the others have no functions.

    Attributes:
        lead: leading dimensions that are all kept.
        size: n.
        used: int64, increasing, numbers of the inputs that are kept.
    """

    lead: tuple[int, ...]
    size: int
    used: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is selected, without the batch."""
        return (*self.lead, len(self.used))

    @property
    def is_range(self) -> bool:
        """Whether the inputs kept stand side by side."""
        return int(self.used[-1]) - int(self.used[0]) + 1 == len(self.used)

    def __call__(self, x: Tensor) -> Tensor:
        """Select from ``[b, ...]``: ``[b, *lead, len(used)]``."""
        return x.reshape(-1, *self.lead, self.size)[..., self.used]

    def emit(self, copier: GraphCopier, node: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
        """Append nodes that select from ``node``, ``[b, *shape]``."""
        if tuple(shape) != (*self.lead, self.size):
            node = copier.graph.call_function(_ATEN.reshape.default, (node, [copier.rows, *self.lead, self.size]))
        return self._emit_pick(copier, node, name)

    def _emit_pick(self, copier: GraphCopier, node: fx.Node, name: str) -> fx.Node:
        graph, dim = copier.graph, 1 + len(self.lead)
        if self.is_range:
            start, end = int(self.used[0]), int(self.used[-1]) + 1
            return graph.call_function(_ATEN.slice.Tensor, (node, dim, start, end))
        copier.root[name] = self.used
        return graph.call_function(_ATEN.index_select.default, (node, dim, graph.get_attr(name)))

    def emit_spread(self, copier: GraphCopier, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Append nodes that put selected elements back to their places in ``[b, *shape]``."""
        places = torch.zeros(self.size, dtype=torch.int64)
        places[self.used] = torch.arange(len(self.used))
        copier.root["places"] = places
        graph = copier.graph
        arguments = (node, 1 + len(self.lead), graph.get_attr("places"))
        spread = graph.call_function(_ATEN.index_select.default, arguments)
        return graph.call_function(_ATEN.reshape.default, (spread, [copier.rows, *shape]))


@dataclass(frozen=True)
class ChannelSelection(Selection):
    """Some of the channels, or all, of an image whose elements stand in the order ``(n, *spatial)``; ``lead`` is empty.

    Attributes:
        spatial: pixels.
    """

    spatial: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is selected, without the batch."""
        return (len(self.used), *self.spatial)

    def __call__(self, x: Tensor) -> Tensor:
        """Select from ``[b, ...]``: ``[b, len(used), *spatial]``."""
        return x.reshape(-1, self.size, *self.spatial)[:, self.used]

    def emit(self, copier: GraphCopier, node: fx.Node, shape: Sequence[int], name: str) -> fx.Node:
        """Append nodes that select from ``node``, ``[b, *shape]``."""
        graph = copier.graph
        if tuple(shape) != (self.size, *self.spatial):
            node = graph.call_function(_ATEN.reshape.default, (node, [copier.rows, self.size, *self.spatial]))
        if len(self.used) == self.size:
            return node
        return self._emit_pick(copier, node, name)


def is_fixed(flow: Flow, node: fx.Node) -> bool:
    """Whether a node's value is the same for every input and batch size."""
    return node in flow.constant and node not in flow.sized


def _needed(flow: Flow, inputs: Sequence[fx.Node], output: fx.Node) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node in inputs or is_fixed(flow, node):
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if node in flow.sized and node.all_input_nodes and node.all_input_nodes[0] in flow.tracks:
            continue
        stack.extend(node.all_input_nodes)
    return needed


def largest_row(flow: Flow, nodes: Sequence[fx.Node]) -> int:
    """Elements for one sample of the largest tensor among nodes, to size chunks by."""
    rows = flow.rows
    sizes = [flow.values[node].numel() for node in nodes if isinstance(flow.values[node], Tensor)]
    return max(1, max(sizes, default=0) // rows)
