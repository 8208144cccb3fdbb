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
    Program,
    QuantizedContraction,
    QuantizedConvContraction,
    TableExpansion,
    readers_behind,
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
        for node in program.graph_module.graph.nodes:
            if node.op != "call_module":
                continue
            if isinstance(program.module(node.target), QuantizedConvContraction):
                replaced |= _fuse_convolution(program, node)
            if not isinstance(program.module(node.target), QuantizedContraction):
                continue
            contraction = program.module(node.target)
            assert isinstance(contraction, QuantizedContraction)
            behind = list(readers_behind(node))
            tables = {
                str(user.target): program.module(str(user.target)) for user in behind if _is_real_table(program, user)
            }
            if contraction.output is not None or not tables:
                continue
            users = [str(user.target) for user in node.users]
            if len(users) == 1 and users[0] in tables:
                replaced |= _fuse(node.target, contraction, users[0], tables[users[0]])
                continue
            # products of several scale groups have one reader each, their sum
            has_others = len(behind) > 1 and not (len(tables) == len(behind) and _share_8_bits(tables.values()))
            apart = has_others and len(contraction.group_sizes) == 1
            for target, table in tables.items():
                assert isinstance(table, TableExpansion)
                if apart or not table.index.is_8_bit:
                    replaced[target] = table.with_index(table.index, "float")
        return program.replace_modules(replaced) if replaced else program


def _fuse_convolution(program: Program, node: fx.Node) -> dict[str, nn.Module]:
    """Give a convolution the quantizer of the tables that read it.

    Tables directly behind then read row numbers. Behind a max-pooling, or beside other readers, they read the real values
    that the row numbers stand for, and quantizing those gives the row numbers again.
    """
    producer = str(node.target)
    contraction = program.module(producer)
    assert isinstance(contraction, QuantizedConvContraction)
    output = contraction.output
    if output is None:
        reader = single_table_behind(program, producer)
        table = program.module(reader) if reader is not None else None
        if not isinstance(table, TableExpansion) or not table.index.is_8_bit:
            return {}
        output = table.index
    tables = {
        str(user.target): program.module(str(user.target)) for user in node.users if _is_real_table(program, user)
    }
    direct = len(tables) == len(node.users)
    if direct and all(isinstance(table, TableExpansion) and table.index == output for table in tables.values()):
        fused: dict[str, nn.Module] = {producer: contraction.with_output(output, "index")}
        for target, table in tables.items():
            assert isinstance(table, TableExpansion)
            fused[target] = table.with_index(output, "index")
        return fused
    return {} if contraction.output is not None else {producer: contraction.with_output(output, "real")}


def _is_real_table(program: Program, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = program.module(str(node.target))
    return isinstance(module, TableExpansion) and module.input == "real"


def _share_8_bits(tables: Iterable[nn.Module]) -> bool:
    """Whether tables have one and the same index of at most 256 rows."""
    indices = {table.index for table in tables if isinstance(table, TableExpansion)}
    return len(indices) == 1 and all(index.is_8_bit for index in indices)


def _fuse(producer: str, contraction: QuantizedContraction, reader: str, table: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(table, TableExpansion)
    if table.index.is_8_bit:
        if len(contraction.group_sizes) > 1:
            return {}
        return {
            producer: contraction.with_output(table.index),
            reader: table.with_index(table.index, "index"),
        }
    multiplier, offset = table.index.to_rows()
    scales = [scale * torch.tensor(multiplier, dtype=torch.float32) for scale in contraction.scales]
    bias = contraction.bias.double() + (offset / scales[0].double())
    # what the integer sum can reach must stay an int32 once it is in units of rows
    if float(bias.abs().max()) > _INT32_MAX // 2 or max(float(scale.max()) for scale in scales) * len(scales) >= 1:
        return {reader: table.with_index(table.index, "float")}
    fused = QuantizedContraction(
        contraction.layer,
        torch.cat(contraction.weights),
        torch.round(bias).to(torch.int32),
        torch.stack(scales),
        contraction.out_shape,
        contraction.weight_bits,
        contraction.group_sizes,
        multiplier=contraction.multiplier,
    )
    return {producer: fused, reader: table.with_index(table.index, "scaled")}
