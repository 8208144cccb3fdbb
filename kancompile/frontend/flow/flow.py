"""Abstract interpretation of an exported graph by element ids.

The graph is run once on a small concrete batch. Beside each data-dependent value runs a :class:`Track`: an *anchor* node
and for each element the one element of the anchor that it depends on. The network input is the first anchor; a
*contraction* or *join* (affine in several elements) and a *barrier* (anything else that depends on several elements)
start new ones. What lies between an anchor and a contraction is therefore a univariate expansion, whatever its code
looks like.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from kancompile.errors import KanCompileError
from kancompile.frontend.flow.dynamic_rows import leaves_rows, mixes_rows
from kancompile.frontend.flow.flow_rules import judge
from kancompile.frontend.flow.matching_products import split_matching_product
from kancompile.frontend.flow.value_bounds import Bounds, value_bounds
from kancompile.frontend.flow.verdicts import Call, Follows, Mixes, Stops, Track, operator_name
from kancompile.frontend.trace import held_state, node_source, returned_nodes
from kancompile.ir import Values, tensors_of

_SHAPE_ONLY = frozenset(
    {
        *("full_like", "ones_like", "zeros_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"),
        *("sym_size", "_assert_tensor_metadata"),
    }
)


@dataclass
class Flow:
    """What the interpretation found.

    Attributes:
        graph: the exported graph; only nodes that the output needs are analysed.
        inputs: user inputs.
        outputs: returned nodes.
        batch: symbol of the batch size.
        values: value of every node on the example.
        parameter_of: state-dict key of the nodes that hold parameters, buffers and constants.
        literals: those of them that are tensors written in the code.
        constant: nodes that do not depend on the input's values.
        sized: constant nodes that depend on the batch size.
        tracks: ids of data-dependent tensors (a tuple where an operator returns several).
        linear: data-dependent nodes that are affine in their data-dependent inputs together.
        anchors: in order of evaluation, True where the anchor is affine in what precedes it.
        mixing: calls that are affine in several elements: contractions and joins.
        contractions: those of them that contract.
        used: anchors whose elements enter a nonlinear function or leave the network.
        barriers: nodes that stop the analysis, and why.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    batch: sympy.Expr
    values: dict[fx.Node, Any] = field(default_factory=dict)
    parameter_of: dict[fx.Node, str] = field(default_factory=dict)
    literals: set[fx.Node] = field(default_factory=set)
    constant: set[fx.Node] = field(default_factory=set)
    sized: set[fx.Node] = field(default_factory=set)
    tracks: dict[fx.Node, Track | tuple[Track | None, ...]] = field(default_factory=dict)
    linear: set[fx.Node] = field(default_factory=set)
    anchors: dict[fx.Node, bool] = field(default_factory=dict)
    mixing: set[fx.Node] = field(default_factory=set)
    contractions: set[fx.Node] = field(default_factory=set)
    used: set[fx.Node] = field(default_factory=set)
    barriers: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def symbols(self) -> dict[sympy.Symbol, tuple[fx.Node, int, int]]:
        """The batch size and dynamic sizes: which dimension of which input is that many times as large."""
        found: dict[sympy.Symbol, tuple[fx.Node, int, int]] = {}
        for node in self.inputs:
            for dim, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int):
                    times, symbol = size.node.expr.as_coeff_Mul()
                    found.setdefault(symbol, (node, dim, int(times)))
        return found

    @property
    def dynamic(self) -> list[sympy.Symbol]:
        """Dynamic sizes beside that of the batch."""
        return [symbol for symbol in self.symbols if symbol != self.batch]

    @property
    def example_sizes(self) -> dict[sympy.Symbol, int]:
        """Dynamic sizes of the example."""
        found = self.symbols
        return {
            symbol: self.values[found[symbol][0]].shape[found[symbol][1]] // found[symbol][2] for symbol in self.dynamic
        }

    def is_dynamic(self, node: fx.Node) -> bool:
        """Whether the shape of a tensor depends on a dynamic size beside that of the batch."""
        value = node.meta.get("val")
        sizes: Iterable[Any] = value.shape if isinstance(value, Tensor) else ()
        symbols = {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
        return bool(symbols & set(self.dynamic))

    def differs_along_dynamic(self, node: fx.Node) -> bool:
        """Whether the values of a tensor differ along a dimension whose size is dynamic."""
        if not self.is_dynamic(node):
            return False
        value, symbols = self.values[node], set(self.dynamic)
        open_dims = [
            dim
            for dim, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols
        ]
        return any(
            not torch.equal(value, value.narrow(dim, 0, 1).expand_as(value)) for dim in open_dims if value.numel()
        )

    @property
    def rows(self) -> int:
        """Samples of the example."""
        return len(self.values[self.inputs[0]])

    def track(self, node: fx.Node) -> Track:
        """Ids of a single tensor."""
        found = self.tracks[node]
        assert isinstance(found, Track), node
        return found

    def bounds(self, node: fx.Node) -> Bounds:
        """Bound a tensor's values, whatever the network's input."""
        return value_bounds(node, self.values, self.constant)

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of a node that depend on the network input (not only on its shape)."""
        if operator_name(node) in _SHAPE_ONLY:
            return []
        return [source for source in node.all_input_nodes if source in self.tracks]

    def factors(self, node: fx.Node) -> list[Any]:
        """Values of the inputs of a node that are constants."""
        return [self.values[source] for source in node.all_input_nodes if source in self.constant]


def analyse(program: ExportedProgram, rows: Values) -> Flow:
    """Interpret a decomposed program on an example batch.

    Args:
        program: the network.
        rows: an input, several in the order of the program.

    Raises:
        KanCompileError: the network draws random numbers, or an operator fails on the example.
    """
    graph = program.graph
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    sources = tuple(n for n in graph.nodes if n.op == "placeholder" and n.name in names)
    outputs = tuple(node for node in returned_nodes(program) if node is not None)
    example = dict(zip(sources, tensors_of(rows), strict=True))
    flow = Flow(graph, sources, outputs, sources[0].meta["val"].shape[0].node.expr)
    live = live_nodes(outputs)
    held = held_state(program)
    for node in graph.nodes:
        if node in example:
            flow.values[node] = example[node]
            _start_anchor(flow, node, defined=False)
        elif node.op == "placeholder" and node in live:
            flow.parameter_of[node], value = held[node.name]
            if node.name in program.graph_signature.inputs_to_lifted_tensor_constants:
                flow.literals.add(node)
            flow.values[node] = value.detach() if isinstance(value, Tensor) else value
            flow.constant.add(node)
        elif node.op == "get_attr" and node in live:  # the body of a loop
            flow.values[node] = getattr(program.graph_module, str(node.target))
            flow.constant.add(node)
        elif node.op == "call_function" and node in live:
            _Step(flow, node, live).run()
        elif node in live and node.op != "output":
            raise KanCompileError(
                f"{node_source(node)}: found control flow {node.name!r} in the graph, expected tensor operations only; "
                "write both branches and choose with torch.where"
            )
    flow.used.update(flow.track(output).anchor for output in outputs if output in flow.tracks)
    return flow


def live_nodes(outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Give the nodes that the outputs need."""
    live: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _start_anchor(flow: Flow, node: fx.Node, defined: bool) -> None:
    value = flow.values[node]
    flow.anchors[node] = defined
    flow.tracks[node] = Track(node, torch.arange(value.numel()).view(value.shape))


class _Step:
    """Interpret one call."""

    def __init__(self, flow: Flow, node: fx.Node, live: set[fx.Node]) -> None:
        self.flow = flow
        self.node = node
        self.live = live
        self.name = operator_name(node)

    def run(self) -> None:
        flow, node = self.flow, self.node
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            raise KanCompileError(
                f"{node_source(node)}: found the random operator {str(target)!r} in evaluation mode, expected a function "
                "of the input alone; draw random numbers only while self.training, and call model.eval() before "
                "torch.export.export"
            )
        args, kwargs = self._evaluate()
        sources = flow.data_inputs(node)
        if not sources:
            flow.constant.add(node)
            meta = node.meta.get("val")
            symbolic = isinstance(meta, Tensor) and any(not isinstance(size, int) for size in meta.shape)
            by_shape = self.name in _SHAPE_ONLY and symbolic
            if isinstance(meta, torch.SymInt) or by_shape or any(s in flow.sized for s in node.all_input_nodes):
                flow.sized.add(node)
            return
        if target is operator.getitem:
            self._pick(sources[0], int(node.args[1]))  # type: ignore[arg-type]
            return
        if all(self._is_of_whole_numbers(source) for source in sources):
            self._read_whole_numbers()
            return
        tracks = {source: flow.track(source) for source in sources}
        value = flow.values[node]
        if not isinstance(value, Tensor | tuple | list):
            raise KanCompileError(
                f"{node_source(node)}: found {str(target)!r}, which turns data into a Python number, expected tensor "
                "operations only"
            )
        call = Call(node, self.name, value, args, kwargs, tracks, flow.bounds)
        match judge(call):
            case Follows(ids) if isinstance(ids, Tensor) and self._leaves_rows(ids, tracks):
                flow.used.update(track.anchor for track in tracks.values())
                _start_anchor(flow, node, defined=False)
            case Mixes(contraction) if flow.dynamic and mixes_rows(node, sources, contraction):
                flow.barriers[node] = (
                    "adds up along a dynamic dimension" if contraction else "joins along a dynamic dimension"
                )
                flow.used.update(track.anchor for track in tracks.values())
                _start_anchor(flow, node, defined=False)
            case Follows(ids, linear):
                anchor = next(iter(tracks.values())).anchor
                if linear:
                    flow.linear.add(node)
                else:
                    flow.used.add(anchor)
                if isinstance(ids, Tensor):
                    flow.tracks[node] = Track(anchor, ids)
                    self._sink()
                else:
                    flow.tracks[node] = tuple(None if part is None else Track(anchor, part) for part in ids)
            case Mixes(contraction):
                flow.linear.add(node)
                flow.mixing.add(node)
                if contraction:
                    flow.contractions.add(node)
                _start_anchor(flow, node, defined=True)
            case Stops() if products := split_matching_product(call):  # which are interpreted next
                self.live.update(products)
                flow.outputs = tuple(products[-1] if output is node else output for output in flow.outputs)
                flow.graph.erase_node(node)
                del flow.values[node]
            case Stops(reason):
                flow.barriers[node] = reason
                flow.used.update(track.anchor for track in tracks.values())
                if isinstance(value, Tensor):
                    _start_anchor(flow, node, defined=False)
                else:
                    flow.tracks[node] = tuple(None for _ in value)

    def _leaves_rows(self, ids: Tensor, tracks: Mapping[fx.Node, Track]) -> bool:
        """Whether what follows one anchor picks or moves rows along dynamic dimensions, or computes with their number."""
        flow = self.flow
        anchor = flow.track(next(iter(tracks.values())).anchor)
        return bool(flow.dynamic) and leaves_rows(self.node, ids, tracks, anchor.ids, flow.batch, flow.sized)

    def _is_of_whole_numbers(self, node: fx.Node) -> bool:
        """Whether a value comes from integer inputs by operators on integers alone, such as tokens that are shifted by one."""
        value = self.flow.values[node]
        if not isinstance(value, Tensor) or value.is_floating_point():
            return False
        return not self.flow.values[self.flow.track(node).anchor].is_floating_point()

    def _read_whole_numbers(self) -> None:
        """Begin anew behind what reads integers, such as an embedding: they have no functions that a table could hold."""
        flow, node = self.flow, self.node
        if isinstance(flow.values[node], Tensor):
            _start_anchor(flow, node, defined=False)
        else:
            flow.tracks[node] = tuple(None for _ in flow.values[node])

    def _evaluate(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        flow, node = self.flow, self.node
        lookup: Callable[[fx.Node], Any] = flow.values.__getitem__
        args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
        try:
            with torch.no_grad():
                flow.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # any operator may refuse any value
            raise KanCompileError(
                f"{node_source(node)}: operator {str(node.target)!r} fails on the example input "
                f"({(str(error).splitlines() or [''])[0]}); pass an example input that the model accepts"
            ) from error
        return tuple(args), dict(kwargs)

    def _pick(self, source: fx.Node, position: int) -> None:
        """Take one of several results."""
        flow, node = self.flow, self.node
        several = flow.tracks[source]
        assert isinstance(several, tuple)
        track = several[position]
        if track is None:
            _start_anchor(flow, node, defined=False)
            return
        flow.tracks[node] = track
        if source in flow.linear:
            flow.linear.add(node)
            self._sink()

    def _sink(self) -> None:
        """Move the anchor behind this node if everything that follows the anchor passes it as a bijective affine map.

        Bias, batch norm and reshapes then belong to the contraction before it (or stay in front of the expansion), and
        the functions of different features stay equal. A uniform scale or shift of a tensor that no contraction
        produces is left to the expansion, where a table absorbs it.
        """
        flow, node = self.flow, self.node
        track = flow.track(node)
        anchor, size = track.anchor, track.ids.numel()
        if operator_name(node) == "unsqueeze":  # the extra dimension belongs to the basis functions that follow
            return
        chain = [node]
        while chain[-1] is not anchor:
            sources = flow.data_inputs(chain[-1])
            if len(sources) != 1 or chain[-1] not in flow.linear or self._readers(sources[0]) != 1:
                return
            chain.append(sources[0])
        reached = torch.zeros(size, dtype=torch.bool)
        if size != flow.values[anchor].numel() or bool((track.ids < 0).any()):
            return
        reached[track.ids.flatten()] = True
        if not bool(reached.all()):
            return
        if not flow.anchors[anchor] and all(self._is_uniform(step) for step in chain[:-1]):
            return
        _start_anchor(flow, node, defined=flow.anchors[anchor])

    def _readers(self, node: fx.Node) -> int:
        return sum(1 for user in node.users if user in self.live and operator_name(user) not in _SHAPE_ONLY)

    def _is_uniform(self, node: fx.Node) -> bool:
        """Whether a linear step treats all elements alike: a move, a scale or a shift by one number, not by a vector."""
        if operator_name(node) == "_native_batch_norm_legit_no_training":
            return False
        factors = [
            value for value in self.flow.factors(node) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        return all(bool((value == value.flatten()[:1]).all()) for value in factors)
