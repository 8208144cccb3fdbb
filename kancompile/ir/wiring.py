"""Follow values through operators that move or select elements, between a convolution and the tables that read it.

Max-pooling selects elements, and a quantizer is monotone, so pooling real values and then quantizing gives the same row
numbers as the reverse; views and transpositions do not change values at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from kancompile.errors import KanCompileError
from kancompile.ir.contraction import AnyContraction
from kancompile.ir.expansion import AnyExpansion
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


def nodes_of(program: Program, target: str) -> list[fx.Node]:
    """Return the nodes that call a module, one for each use of its layer, in the order of evaluation.

    Raises:
        KanCompileError: no node does.
    """
    found = program.calls().get(target, [])
    if not found:
        raise KanCompileError(f"{target!r}: found no node of the program that calls it, expected one at least")
    return found


def source_in_front(node: fx.Node) -> fx.Node:
    """Return the node whose values another one reads, directly or moved or selected."""
    source = node.all_input_nodes[0]
    while _is_selecting(source):
        source = source.all_input_nodes[0]
    return source


def contraction_in_front(program: Program, target: str) -> tuple[str, AnyContraction] | None:
    """Return name and module of the contraction that an expansion reads, ``None`` where it reads something else in a use."""
    sources = [source_in_front(node) for node in nodes_of(program, target)]
    names = {str(source.target) if source.op == "call_module" else "" for source in sources}
    name = names.pop()
    module = program.module(name) if name and not names else None
    return (name, module) if isinstance(module, AnyContraction) else None


def single_table_behind(program: Program, target: str) -> str | None:
    """Return the one expansion that reads a module's output, and nothing else, in every use; ``None`` for other readers."""
    readers = [list(readers_behind(node)) for node in nodes_of(program, target)]
    tables = tables_behind(program, target)
    if len(tables) != 1 or any(len(found) != 1 for found in readers):
        return None
    return tables[0] if {found[0] for found in readers} == set(nodes_of(program, tables[0])) else None


def tables_behind(program: Program, target: str) -> list[str]:
    """List the expansions that read a module's output."""
    behind = [reader for node in nodes_of(program, target) for reader in readers_behind(node)]
    names = [str(reader.target) for reader in behind if reader.op == "call_module"]
    return [name for name in dict.fromkeys(names) if isinstance(program.module(name), AnyExpansion)]


def reads_one_convolution(program: Program, target: str) -> bool:
    """Whether an expansion is the only reader of a convolution."""
    found = contraction_in_front(program, target)
    return found is not None and found[1].geometry is not None and single_table_behind(program, found[0]) == target


def quantizer_in_front(program: Program, target: str) -> IndexQuantizer | None:
    """Return the quantizer that the convolution in front of an expansion is to have, ``None`` where it has none."""
    found = contraction_in_front(program, target)
    return None if found is None or found[1].geometry is None else found[1].output


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
            owner = table.first_row.long() // table.rows
        found.append((owner[:, None] * table.k + torch.arange(table.k)).flatten() + count)
        count += table.n_tables * table.k
    return torch.cat(found)
