"""Follow values through operators that move or select elements, between a convolution and the tables that read it.

Max-pooling selects elements, and a quantizer is monotone, so pooling real values and then quantizing gives the same row
numbers as the reverse; views and transpositions do not change values at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from kancompile.errors import KanCompileError
from kancompile.ir.convolution import ConvContraction, QuantizedConvContraction
from kancompile.ir.expansion import Expansion
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.program import Layer, Program
from kancompile.ir.table import TableExpansion

_SELECTING = frozenset(
    f"aten.{name}"
    for name in (
        "max_pool1d.default",
        "max_pool2d.default",
        "max_pool3d.default",
        "max_pool2d_with_indices.default",
        "max_pool3d_with_indices.default",
        "view.default",
        "reshape.default",
        "flatten.using_ints",
        "permute.default",
        "transpose.int",
        "squeeze.dim",
        "squeeze.dims",
        "unsqueeze.default",
        "clone.default",
        "dropout.default",
    )
)


def _is_selecting(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if str(node.target) in _SELECTING:
        return True
    # the first result of a pooling with indices; the second would be numbers, not values
    return "getitem" in str(node.target) and bool(node.args[1] == 0)


def readers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a value, directly or moved or selected; shapes that are only asked for do not count."""
    for user in node.users:
        if _is_selecting(user):
            yield from readers_behind(user)
        elif "sym_size" not in str(user.target):
            yield user


def single_table_behind(program: Program, target: str) -> str | None:
    """Return the one expansion that reads a module's output, or ``None`` where there are other readers."""
    readers = list(readers_behind(_node(program, target)))
    tables = tables_behind(program, target)
    return tables[0] if len(readers) == 1 and tables else None


def tables_behind(program: Program, target: str) -> list[str]:
    """List the expansions that read a module's output."""
    readers = [reader for reader in readers_behind(_node(program, target)) if reader.op == "call_module"]
    modules = {str(reader.target): program.module(str(reader.target)) for reader in readers}
    return [name for name, module in modules.items() if isinstance(module, Expansion | TableExpansion)]


def reads_one_convolution(program: Program, target: str) -> bool:
    """Whether an expansion is the only reader of a convolution."""
    source = _node(program, target).all_input_nodes[0]
    while _is_selecting(source):
        source = source.all_input_nodes[0]
    if source.op != "call_module":
        return False
    if not isinstance(program.module(str(source.target)), ConvContraction | QuantizedConvContraction):
        return False
    return single_table_behind(program, str(source.target)) == target


def quantizer_in_front(program: Program, target: str) -> IndexQuantizer | None:
    """Return the quantizer that the convolution in front of an expansion is to have, ``None`` where it has none."""
    source = _node(program, target).all_input_nodes[0]
    while _is_selecting(source):
        source = source.all_input_nodes[0]
    module = program.module(str(source.target)) if source.op == "call_module" else None
    return module.output if isinstance(module, ConvContraction | QuantizedConvContraction) else None


def _node(program: Program, target: str) -> fx.Node:
    nodes: list[fx.Node] = list(program.graph_module.graph.nodes)
    return next(node for node in nodes if node.op == "call_module" and node.target == target)


def layer_tables(program: Program, layer: Layer) -> list[TableExpansion]:
    """Return the tables that a layer reads, in order.

    Raises:
        KanCompileError: an expansion has not been tabulated.
    """
    tables = []
    for target in layer.expansions:
        module = program.module(target)
        if not isinstance(module, TableExpansion):
            raise KanCompileError(
                f"layer {layer.name!r}: {target!r} is no table; tabulate expansions before rounding weights"
            )
        tables.append(module)
    return tables


def branch_of_column(tables: Sequence[TableExpansion]) -> Tensor:
    """Number the branch of every column within its table, int64 ``[c]``."""
    found = []
    for table in tables:
        sizes = torch.tensor(table.branch_sizes)
        found.append(torch.repeat_interleave(torch.arange(len(sizes)), sizes).repeat(table.n_in))
    return torch.cat(found)


def tied_columns(tables: Sequence[TableExpansion]) -> Tensor:
    """Number the columns by the table column they are looked up in, int64 ``[c]``: those can only be rescaled together."""
    found, count = [], 0
    for table in tables:
        owner = torch.zeros(table.n_in, dtype=torch.int64)
        if table.first_row is not None:
            owner = table.first_row.long() // table.index.levels
        found.append((owner[:, None] * table.k + torch.arange(table.k)).flatten() + count)
        count += table.n_tables * table.k
    return torch.cat(found)
