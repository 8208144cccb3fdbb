"""Let a contraction hand row numbers, or values in units of rows, straight to the table that reads it.

    y = contract(...); r = index(y)            ->   r = contract_to_index(...)          at most 256 rows
    y = contract(...); r = floor(y * m + d)    ->   u = contract(... * m, + d); r = floor(u)    more rows

    y = conv(...); r = index(y)                ->   r = convolve_to_index(...)          always 256 rows at most

The first two save the work between two layers. The first becomes one integer kernel with a uint8 output; in the second the
factor and the offset disappear into the scales and the bias of the integer product. It applies only where the table is
the contraction's single reader. Where a contraction has other readers too, tables are indexed in float, because ONNX Runtime
makes no integer kernel of a product with a QuantizeLinear and another reader behind it, and a 16-bit QuantizeLinear always
undoes it, also from behind operators that only move values. Several tables of one 8-bit index are one reader: the exporter
merges their QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from kancompile.ir import (
    HandOver,
    IntegerContraction,
    Program,
    TableExpansion,
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
        for node, contraction in program.nodes(IntegerContraction):
            if contraction.geometry is not None:
                replaced |= _fuse_convolution(program, node, contraction)
                continue
            behind = list(readers_behind(node))
            tables = _real_tables(program, behind)
            if contraction.output is not None or not tables:
                continue
            users = [str(user.target) for user in node.users]
            if len(users) == 1 and users[0] in tables:
                replaced |= _fuse(str(node.target), contraction, users[0], tables[users[0]])
                continue
            # products of several scale groups have one reader each, their sum
            has_others = len(behind) > 1 and not (len(tables) == len(behind) and _share_8_bits(tables.values()))
            apart = has_others and len(contraction.group_sizes) == 1
            for target, table in tables.items():
                if apart or not table.index.is_8_bit:
                    replaced[target] = table.replace(input="float")
        return program.replace_modules(replaced) if replaced else program


def _fuse_convolution(program: Program, node: fx.Node, contraction: IntegerContraction) -> dict[str, nn.Module]:
    """Give a convolution the quantizer of the tables that read it.

    Tables directly behind then read row numbers. Behind a max-pooling, or beside other readers, they read the real values
    that the row numbers stand for, and quantizing those gives the row numbers again.
    """
    producer, output = str(node.target), contraction.output
    if output is None:
        reader = single_table_behind(program, producer)
        table = program.module(reader) if reader is not None else None
        if not isinstance(table, TableExpansion) or not table.index.is_8_bit:
            return {}
        output = table.index
    tables = _real_tables(program, node.users)
    if len(tables) == len(node.users) and all(table.index == output for table in tables.values()):
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
