"""From a quantized program to the plan of a C file.

Values between layers are arrays of row numbers. Operators that only move data (reshape, permute, slice, ...) are not executed:
they are applied to the positions of the elements, and end up in the order of a layer's weights, of the input or of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from kancompile.errors import KanCompileError
from kancompile.ir import IntegerContraction, Program, TableExpansion, attribute, nodes_of, regroup, to_channels_last
from kancompile.targets.c99 import layers
from kancompile.targets.c99.float_inputs import FloatStep, are_equal, float_steps
from kancompile.targets.c99.steps import (
    Buffer,
    Contract,
    Gather,
    Index,
    Input,
    MaxPool,
    Output,
    Plan,
    Read,
    Recode,
    Step,
    Store,
)

MOVES = frozenset(
    {
        "alias",
        "clone",
        "detach",
        "expand",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "transpose",
        "unsqueeze",
        "view",
    }
)
"""ATen operators that move elements and change none."""


@dataclass(frozen=True)
class _Elements:
    """Elements of an array; ``ids`` ``[1, ...]`` says which one stands where."""

    ids: Tensor


@dataclass(frozen=True)
class _RealInput(_Elements):
    """The model's input, or what it does to each of its elements in float.

    Attributes:
        source: int64, the real input that each element is made of.
        steps: what is done to it, in order.
    """

    source: Tensor
    steps: tuple[FloatStep, ...] = ()


@dataclass(frozen=True)
class _Sums(_Elements):
    """Real outputs of a linear layer, ``[positions, n_out]``."""

    layer: int


@dataclass(frozen=True)
class _Codes(_Elements):
    """An array of row numbers; ``values`` float32 is what each of them stands for, where readers want real values."""

    buffer: Buffer
    values: Tensor | None


@dataclass(frozen=True)
class _Pooled:
    """The pair that a max-pooling returns, of which the indices cannot be had."""

    values: _Codes


def make_plan(program: Program) -> Plan:
    """Plan a program.

    Raises:
        KanCompileError: a part of the program stays in float, or needs an operator that the target does not have.
    """
    return _Planner(program).plan()


class _Planner:
    """Visits nodes by methods of the names of their ``op``, as ``fx.Interpreter`` does."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self.contract_at: dict[int, int] = {}
        self.inputs: list[Input] = []
        self.buffers = 0

    def plan(self) -> Plan:
        for node in self.program.graph_module.graph.nodes:
            self.values[node] = getattr(self, node.op)(node)
        return Plan(int(np.prod(self.program.input_shape)), tuple(self.inputs), tuple(self.steps), self.values[node])

    def placeholder(self, node: fx.Node) -> _RealInput:
        shape = self.program.input_shape
        elements = torch.arange(int(np.prod(shape)))
        return _RealInput(elements.reshape(1, *shape), elements)

    def get_attr(self, node: fx.Node) -> Any:
        return attribute(self.program.graph_module, str(node.target))

    def call_module(self, node: fx.Node) -> Any:
        module = self.program.module(str(node.target))
        visit = next((visit for kind, visit in _MODULES.items() if isinstance(module, kind)), None)
        if visit is None:
            raise self._refused(
                node, f"{type(module).__name__} computes in float", 'precision = "int8" and lowering = "table"'
            )
        return visit(self, node, module)

    def call_function(self, node: fx.Node) -> Any:
        name = _operator_name(node)
        sources = [self.values[source] for source in node.all_input_nodes]
        if sources and all(isinstance(value, Tensor | int) for value in sources):  # constants, and sizes of one sample
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        handler: Callable[..., Any] = _FUNCTIONS.get(name, _Planner._of_codes)
        if handler is _Planner._of_codes and any(isinstance(value, _RealInput) for value in sources):
            handler = _Planner._of_inputs
        found = handler(self, node, sources)
        if found is None:
            raise self._refused(node, f"{name} computes in float", None)
        return found

    def _moved(self, node: fx.Node, sources: list[Any]) -> _Elements | None:
        moved = [value for value in sources if isinstance(value, _Elements)]
        if len(moved) != 1:
            return None
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: getattr(self.values[source], "ids", self.values[source])
        )
        return replace(moved[0], ids=node.target(*args, **kwargs))  # type: ignore[operator]

    def _of_codes(self, node: fx.Node, sources: list[Any]) -> _Codes | None:
        """Make a function of a code a table of its values: nothing is computed at run time."""
        first = next((value for value in sources if isinstance(value, _Elements)), None)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not pointwise or not isinstance(first, _Codes) or first.values is None or not self._are_same(sources, first):
            return None
        args, kwargs = self._at_codes((node.args, node.kwargs))
        found = node.target(*args, **kwargs)  # type: ignore[operator]
        fits = found.shape == first.values.shape and found.dtype == torch.float32
        return replace(first, values=found) if fits else None

    def _of_inputs(self, node: fx.Node, sources: list[Any]) -> _RealInput | None:
        """Do in float, before anything is looked up, what is done to every input with constants."""
        values: list[Any] = [self.values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        places = [place for place, value in enumerate(values) if isinstance(value, _Elements)]
        if len(places) != 1:
            return None
        value = values[places[0]]
        steps = float_steps(_operator_name(node), places[0], tuple(values), node.kwargs, value.ids.shape)
        if steps is None:
            return None
        elements = value.ids.reshape(-1)
        before = tuple(step.at(elements) for step in value.steps)
        ids = torch.arange(len(elements)).reshape(value.ids.shape)
        return _RealInput(ids, value.source[elements], (*before, *steps))

    def _item(self, node: fx.Node, sources: list[Any]) -> _Codes | _RealInput | None:
        if node.args[1] != 0:
            return None
        if isinstance(sources[0], _RealInput):  # what a normalization gives first
            return sources[0]
        return sources[0].values if isinstance(sources[0], _Pooled) else None

    def _are_same(self, sources: list[Any], value: _Codes) -> bool:
        """Whether all operands are functions of the same element, or one number for all."""
        return all(
            (isinstance(source, _Codes) and source.buffer == value.buffer and torch.equal(source.ids, value.ids))
            or (isinstance(source, Tensor) and source.numel() == 1)
            for source in sources
        )

    def _at_codes(self, arguments: Any) -> Any:
        """Put the values of all codes in the place of nodes."""

        def values(source: fx.Node) -> Any:
            value = self.values[source]
            return value.values if isinstance(value, _Codes) else value.reshape(())

        return fx.node.map_arg(arguments, values)

    def _ascending(self, value: _Codes) -> _Codes:
        """Number codes anew where a larger one does not stand for a larger value."""
        assert value.values is not None
        if bool((value.values.diff() >= 0).all()):
            return value
        distinct, codes = torch.unique(value.values, return_inverse=True)
        target = self._buffer(value.buffer.size, False)
        self.steps.append(Recode(value.buffer, target, codes.numpy().astype(np.uint8)))
        return _Codes(value.ids, target, distinct)

    def _read(self, node: fx.Node, table: TableExpansion) -> Read:
        value = self.values[node.all_input_nodes[0]]
        if not isinstance(value, _Elements) or len(value.ids) != 1:
            raise self._refused(node, "parts of a sample are read as samples of their own", None)
        ids = value.ids if table.channels_first else regroup(value.ids, table.read_shape)
        if table.picks is not None:
            ids = ids[..., table.picks]
        order = (to_channels_last(ids) if table.channels_first else ids).reshape(-1).numpy()
        if isinstance(value, _RealInput):
            index, scaling = layers.index_of_inputs(table, len(order))
            steps = (*(step.at(torch.from_numpy(order)) for step in value.steps), *scaling)
            buffer = self._input(index, value.source.numpy()[order], steps)
            return _read_of(table, buffer)
        behind: Tensor | None = None
        if isinstance(value, _Sums):
            source = self._store(value.layer, layers.store_for(table))
        else:
            assert isinstance(value, _Codes)
            source = value.buffer
            if table.input != "index":
                assert value.values is not None
                behind = value.values
        alone, in_order = np.prod(table.in_shape[:-1]) == 1, np.arange(source.size)
        if np.array_equal(order, in_order):
            return _read_of(table, source, behind)
        if alone and self._takes_any_order(node) and np.array_equal(np.sort(order), in_order):
            return replace(_read_of(table, source, behind), order=order)
        moved = self._buffer(len(order), source.wide)
        self.steps.append(Gather(source, moved, order))
        return _read_of(table, moved, behind)

    def _takes_any_order(self, node: fx.Node) -> bool:
        """Whether all readers are linear layers whose columns share a scale, so that their weights can be reordered.

        Those of a layer that is used several times stay in one order.
        """
        if len(nodes_of(self.program, str(node.target))) > 1:
            return False
        modules = [self.program.module(str(user.target)) for user in node.users if user.op == "call_module"]
        return all(
            isinstance(module, IntegerContraction)
            and module.geometry is None
            and len(module.group_sizes) == 1
            and module.multiplier is None
            for module in modules
        )

    def _input(self, index: Index, order: Any, steps: tuple[FloatStep, ...]) -> Buffer:
        for known in self.inputs:
            if known.index == index and np.array_equal(known.order, order) and are_equal(known.steps, steps):
                return known.target
        target = Buffer(f"input{len(self.inputs)}", len(order), index.levels > 256)
        self.inputs.append(Input(target, index, order, steps))
        return target

    def _store(self, number: int, store: Store) -> Buffer:
        at = self.contract_at[number]
        step = self.steps[at]
        assert isinstance(step, Contract)
        for known in step.stores:
            if known.key == store.key:
                return known.buffer
        buffer = self._buffer(step.window.positions * step.n_out, store.levels > 256)
        self.steps[at] = replace(step, stores=(*step.stores, replace(store, buffer=buffer)))
        return buffer

    def _contract(self, node: fx.Node, module: IntegerContraction) -> _Sums | _Codes:
        reads = [self.values[source] for source in node.all_input_nodes]
        assert all(isinstance(read, Read) for read in reads)
        number = len(self.contract_at)
        if module.geometry is not None:
            if module.output is None:
                raise self._refused(
                    node, "the output of the convolution has no 8-bit quantizer", "levels = 256 for the layer behind"
                )
            expansion = self.program.node(str(node.all_input_nodes[0].target), TableExpansion)
            step = layers.plan_convolution(number, module, module.geometry, reads, expansion.in_shape[:-1])
        else:
            step = layers.plan_linear(number, module, reads)
        limit = step.largest_sum()
        if limit >= 1 << 31:
            raise self._refused(
                node, f"sums of products may reach {limit:,}, more than an int32 holds", "fewer weight_bits"
            )
        self.contract_at[number] = len(self.steps)
        self.steps.append(step)
        positions = torch.arange(step.window.positions * step.n_out)
        if module.geometry is not None:
            ids = positions.reshape(1, *module.out_shape[1:], step.n_out).movedim(-1, 1)
        else:
            ids = positions.reshape(1, *module.out_shape)
        if module.output is None:
            return _Sums(ids, number)
        buffer = self._store(number, layers.requantize(module.scales[0], module.output))
        if module.hands_over.kind == "rows":
            return _Codes(ids, buffer, None)
        codes = torch.arange(module.output.levels).to(torch.uint8)
        return _Codes(ids, buffer, module.output.real(codes))

    def _max_pool(self, node: fx.Node, sources: list[Any]) -> _Pooled | None:
        value = sources[0]
        if not isinstance(value, _Codes) or value.values is None:
            return None
        value = self._ascending(value)
        _, channels, *spatial = value.ids.shape
        order = to_channels_last(value.ids).reshape(-1).numpy()
        source = value.buffer
        if not np.array_equal(order, np.arange(source.size)):
            source = self._buffer(len(order), value.buffer.wide)
            self.steps.append(Gather(value.buffer, source, order))
        pooled, *_ = node.target(torch.zeros(1, channels, *spatial), *node.args[1:], **node.kwargs)  # type: ignore[operator, misc]
        out_size = tuple(pooled.shape[2:])
        window = layers.pool_window(node.args, tuple(spatial), out_size)
        target = self._buffer(int(np.prod(out_size)) * channels, source.wide)
        self.steps.append(MaxPool(source, target, window, channels))
        ids = torch.arange(target.size).reshape(1, *out_size, channels).movedim(-1, 1)
        return _Pooled(_Codes(ids, target, value.values))

    def output(self, node: fx.Node) -> Output:
        if not isinstance(node.args[0], fx.Node):
            raise KanCompileError(
                f"target 'c99': found a model of {len(node.all_input_nodes)} outputs, expected one; "
                "compile a part of it that has one"
            )
        value = self.values[node.args[0]]
        if isinstance(value, _Codes) and value.values is not None:
            value = self._ascending(value)
            assert value.values is not None
            kept: tuple[Any, ...] = (value.buffer, value.values.numpy())
        elif isinstance(value, _Sums):
            at = self.contract_at[value.layer]
            step = self.steps[at]
            assert isinstance(step, Contract)
            self.steps[at] = replace(step, keeps_sums=True)
            kept = ()
        else:
            raise KanCompileError(
                "target 'c99': the model's output does not come from a KAN layer as real values; "
                "compile a part of it that ends in a KAN layer"
            )
        return Output(tuple(value.ids.shape[1:]), value.ids.reshape(-1).numpy(), *kept)

    def _buffer(self, size: int, wide: bool) -> Buffer:
        self.buffers += 1
        return Buffer(f"rows{self.buffers - 1}", size, wide)

    def _refused(self, node: fx.Node, reason: str, recipe: str | None) -> KanCompileError:
        """Name the layer nearest to a node, why it cannot be expressed, and what to do."""
        source = {part.node: part.source for part in self.program.unrecognized}.get(node.name, "")
        where = f" ({source})" if source else ""
        way = (
            f"set {recipe} in the recipe"
            if recipe
            else "compile for 'ort-cpu', which runs it, or take it out of the model"
        )
        return KanCompileError(
            f"target 'c99': layer {self._nearest_layer(node)!r}: {reason}{where}, expected integer tables and products; {way}"
        )

    def _nearest_layer(self, node: fx.Node) -> str:
        layer_of: Mapping[str, str] = {
            target: layer.name for layer in self.program.layers() for target in (layer.contraction, *layer.expansions)
        }
        for neighbours in ("users", "all_input_nodes"):
            waiting, seen = [node], set()
            while waiting:
                current = waiting.pop(0)
                if current.op == "call_module" and str(current.target) in layer_of:
                    return layer_of[str(current.target)]
                seen.add(current)
                waiting += [near for near in getattr(current, neighbours) if near not in seen]
        return node.name


_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    TableExpansion: _Planner._read,
    IntegerContraction: _Planner._contract,
}
_FUNCTIONS: dict[str, Callable[[_Planner, fx.Node, list[Any]], Any]] = {
    **dict.fromkeys(MOVES, _Planner._moved),
    "sym_size": lambda *_: 1,  # of the batch, which is the only dimension without a fixed size
    "max_pool2d_with_indices": _Planner._max_pool,
    "getitem": _Planner._item,
}
"""All other operators may be functions of a code (``_of_codes``)."""


def _operator_name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(node.target, "__name__", node.target)))


def _read_of(table: TableExpansion, buffer: Buffer, behind: Tensor | None = None) -> Read:
    """Read a table, by codes that stand for the values ``behind`` instead of its own row numbers where those are given."""
    rows = table.table.numpy() if behind is None else layers.rows_behind(table, behind)
    if table.first_row is None:
        return Read(buffer, rows, None, table.n_in)
    number = table.first_row.numpy().astype(np.int64) // table.index.levels
    return Read(buffer, rows, number * (len(rows) // table.n_tables), table.n_in)
