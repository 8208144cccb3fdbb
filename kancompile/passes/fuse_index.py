"""Let a contraction hand row numbers, or values in units of rows, straight to the table that reads it.

    y = contract(...); r = index(y)            ->   r = contract_to_index(...)          at most 256 rows
    y = contract(...); r = floor(y * m + d)    ->   u = contract(... * m, + d); r = floor(u)    more rows

    y = conv(...); r = index(y)                ->   r = convolve_to_index(...)          always 256 rows at most

The first two save the work between two layers. The first becomes one integer kernel with a uint8 output; in the second the
factor and the offset disappear into the scales and the bias of the integer product. It applies only where the table is
the contraction's single reader, in every use of a layer that is used several times. Where a contraction has other readers
too, tables are indexed in float, because ONNX Runtime makes no integer kernel of a product with a QuantizeLinear and another
reader behind it, and a 16-bit QuantizeLinear always undoes it, also from behind operators that only move values. So are
tables that one use alone reads directly: ONNX Runtime would fuse that use. Several tables of one 8-bit index are one reader:
the exporter merges their QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from kancompile.ir import (
    HandOver,
    IntegerContraction,
    Program,
    TableExpansion,
    nodes_of,
    readers_behind,
    rows_of,
    single_table_behind,
)

_INT32_MAX = (1 << 31) - 1


@dataclass(frozen=True)
class FuseIndex:
    """Fuse every index that can be; the second run changes nothing."""

    name = "fuse-index"

    def __call__(self, program: Program) -> Program:
        """Return the program with fused indices."""
        replaced: dict[str, nn.Module] = {}
        contractions = {str(node.target): contraction for node, contraction in program.nodes(IntegerContraction)}
        for producer, contraction in contractions.items():
            nodes = nodes_of(program, producer)
            if contraction.geometry is not None:
                replaced |= _fuse_convolution(program, producer, nodes, contraction)
            elif contraction.output is None:
                replaced |= _fuse_linear(program, producer, nodes, contraction)
        return program.replace_modules(replaced) if replaced else program


def _fuse_linear(
    program: Program, producer: str, nodes: Sequence[fx.Node], contraction: IntegerContraction
) -> dict[str, nn.Module]:
    users = [user for node in nodes for user in node.users]
    tables = _real_tables(program, users)
    if len(users) == len(nodes) and len(tables) == 1 and single_table_behind(program, producer) in tables:
        ((reader, table),) = tables.items()
        return _fuse(producer, contraction, reader, table)
    found: dict[str, nn.Module] = {}
    for node in nodes:
        behind = list(readers_behind(node))
        tables = _real_tables(program, behind)
        # products of several scale groups have one reader each, their sum
        is_alone = len(tables) == len(behind) and _share_8_bits(tables.values())
        fuses = is_alone and len(behind) == 1 and behind[0] in node.users  # which the other uses do not allow
        apart = (fuses or (len(behind) > 1 and not is_alone)) and len(contraction.group_sizes) == 1
        for target, table in tables.items():
            if apart or not table.index.is_8_bit:
                found[target] = table.replace(input="float")
    return found


def _fuse_convolution(
    program: Program, producer: str, nodes: Sequence[fx.Node], contraction: IntegerContraction
) -> dict[str, nn.Module]:
    """Give a convolution the quantizer of the tables that read it.

    Tables directly behind then read row numbers. Behind a max-pooling, or beside other readers, they read the real values
    that the row numbers stand for, and quantizing those gives the row numbers again.
    """
    output = contraction.output
    if output is None:
        reader = single_table_behind(program, producer)
        table = program.module(reader) if reader is not None else None
        if not isinstance(table, TableExpansion) or not table.index.is_8_bit:
            return {}
        output = table.index
    users = [user for node in nodes for user in node.users]
    tables = _real_tables(program, users)
    read_nothing_else = {node for target in tables for node in nodes_of(program, target)} == set(users)
    if read_nothing_else and all(table.index == output for table in tables.values()):
        handed = rows_of(output)
        fused = {target: table.reading(handed) for target, table in tables.items()}
        return {producer: contraction.replace(hands_over=handed), **fused}
    if contraction.output is not None:
        return {}
    return {producer: contraction.replace(hands_over=HandOver("real", output))}


def _real_tables(program: Program, readers: Iterable[fx.Node]) -> dict[str, TableExpansion]:
    """Return by their names the tables among the readers that quantize real values as QuantizeLinear does."""
    found = {str(node.target): program.module(str(node.target)) for node in readers if node.op == "call_module"}
    return {
        target: table for target, table in found.items() if isinstance(table, TableExpansion) and table.input == "real"
    }


def _share_8_bits(tables: Iterable[TableExpansion]) -> bool:
    """Whether tables have one and the same index of at most 256 rows."""
    indices = {table.index for table in tables}
    return len(indices) == 1 and all(index.is_8_bit for index in indices)


def _fuse(producer: str, contraction: IntegerContraction, reader: str, table: TableExpansion) -> dict[str, nn.Module]:
    if table.index.is_8_bit:
        if len(contraction.group_sizes) > 1:
            return {}
        handed = rows_of(table.index)
        return {producer: contraction.replace(hands_over=handed), reader: table.reading(handed)}
    multiplier, offset = table.index.to_rows()
    scales = [scale * torch.tensor(multiplier, dtype=torch.float32) for scale in contraction.scales]
    bias = contraction.bias.double() + (offset / scales[0].double())
    # what the integer sum can reach must stay an int32 once it is in units of rows
    if float(bias.abs().max()) > _INT32_MAX // 2 or max(float(scale.max()) for scale in scales) * len(scales) >= 1:
        return {reader: table.replace(input="float")}
    handed = HandOver("scaled", table.index)
    fused = contraction.replace(bias=torch.round(bias).to(torch.int32), scale=torch.stack(scales), hands_over=handed)
    return {producer: fused, reader: table.reading(handed)}
