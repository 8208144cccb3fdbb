"""Bring tables into the form that ONNX Runtime reads fastest; every value that a program computes stays the same.

* Large layers look two inputs up at a time. A Gather costs about 4 ns for each row number, whatever the length of the row,
  and that was half the time of a convolutional network. Row numbers joined to pairs by the integer matrix kernel saved
  5 % of the whole for one image, 13 % for 32 and 21 % for 128, although the tables of pairs (650 KB for 255 rows of 5
  bytes) do not stay in the first-level cache; with fewer rows it is more.
* Linear layers of few functions an input look every function up in a column of its own (``column_tables``).
* Other small tables get rows up to 256: QuantizeLinear saturates there, so no Clip is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.ir import PAIRED_FROM, IndexQuantizer, JointTable, Program, TableExpansion, nodes_of, rows_of
from kancompile.targets.onnx.column_tables import arrange_columns, in_columns
from kancompile.targets.onnx.function_planes import arrange_planes, can_be_planes

_ROW_PADDING_BYTES = 1 << 14
_PAIR_BYTES = 1 << 21


def arrange_tables(program: Program, pairs: bool = True) -> Program:
    """Apply all rewrites; those whose tables are larger in memory, column by column and of two inputs, only with ``pairs``."""
    program = make_parts(pass_rows_on(program))
    program = arrange_planes(pad_rows(pair_inputs(program) if pairs else program))
    return arrange_columns(program) if pairs else program


class RowTable(TableExpansion):
    """A table whose rows hold their own numbers, as in front of an ordinary layer: nothing is looked up."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to row numbers, uint8 ``[b, *, n_in, 1]``; those that were found in float are int32."""
        return self.to_index(x).to(torch.uint8).unsqueeze(-1)


def pass_rows_on(program: Program) -> Program:
    """Leave out the lookup of tables that hold their own row numbers."""
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        for target, table in program.tables(layer).items():
            if torch.equal(table.table.flatten(), torch.arange(256).byte()):
                modules[target] = RowTable(**table.fields())
    return program.replace_modules(modules) if modules else program


class BasisJointTable(JointTable):
    """A joint table whose parts a file makes of integer mixtures."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        assert self.made_of is not None
        for name in ("basis", "mix", "bias", "shift"):
            self.register_buffer(name, getattr(self.made_of, name))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, n]`` to table codes, uint8 ``[b, c, 1]``."""
        codes: Tensor = torch.ops.kancompile.expand_joint_of_basis(
            self.to_index(x), self.members, self.basis, self.mix, self.bias, self.shift
        )
        return codes


def make_parts(program: Program) -> Program:
    """Store what the parts of joint tables are made of in their place."""
    found = program.nodes(JointTable)
    modules = {
        str(node.target): BasisJointTable(**table.fields()) for node, table in found if table.made_of is not None
    }
    return program.replace_modules(modules) if modules else program


class PairedTable(TableExpansion):
    """A table that two neighboring inputs read together."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, ...]`` to table codes, uint8 ``[b, *, n_in, k]``."""
        codes: Tensor = torch.ops.kancompile.expand_pairs(self.to_index(x), self.table)
        return codes


def pair_inputs(program: Program) -> Program:
    """Let layers of many inputs look up two at a time, where a table of all pairs of rows is small enough.

    It takes at most 255 rows: then ``rows * even + odd`` is a product of bytes, and no row number is left over.
    """
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        if can_be_planes(program, layer):
            continue
        columns = in_columns(program, layer)
        for target, table in program.tables(layer).items():
            if type(table) is TableExpansion and target not in columns and _can_pair(table):
                modules[target] = PairedTable(**(table.fields() | {"first_row": None}))
    return program.replace_modules(modules) if modules else program


def _can_pair(table: TableExpansion) -> bool:
    rows = table.index.levels
    return (
        table.n_tables == 1
        and rows <= 255
        and table.input in ("real", "index")
        and table.n_in % 2 == 0
        and math.prod(table.in_shape) >= PAIRED_FROM
        and rows * rows * 2 * table.k <= _PAIR_BYTES
    )


def pad_rows(program: Program) -> Program:
    """Repeat the last row of small tables up to 256 rows, so that no Clip is needed in front of the lookup.

    QuantizeLinear saturates at 255; rows beyond the last level then hold what the last level holds. A contraction that
    hands over row numbers saturates there too, which takes that all tables that read it can be padded.
    """
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        contraction = program.contraction(layer)
        users = [user for node in nodes_of(program, layer.contraction) for user in node.users]
        readers = dict.fromkeys(str(user.target) for user in users if user.op == "call_module")
        padded = {target: _with_256_rows(program.module(target)) for target in readers}
        output = contraction.hands_over.index
        if contraction.hands_over.kind != "rows" or output is None:
            continue
        if not padded or any(table is None for table in padded.values()):
            continue
        wide = IndexQuantizer(output.scale, output.zero_point, 256)
        modules |= {target: table for target, table in padded.items() if table is not None}
        modules[layer.contraction] = contraction.replace(hands_over=rows_of(wide))
    for layer in program.layers():
        for target, table in program.tables(layer).items():
            if table.input != "index":
                padded_table = _with_256_rows(table)
                if padded_table is not None:
                    modules[target] = padded_table
    return program.replace_modules(modules) if modules else program


def _with_256_rows(table: nn.Module) -> TableExpansion | None:
    if type(table) is not TableExpansion or table.n_tables > 1:
        return None
    missing = 256 - table.index.levels
    if missing <= 0 or missing * table.k > _ROW_PADDING_BYTES:
        return None
    rows = torch.cat([table.table, table.table[-1:].expand(missing, -1)])
    return table.replace(index=IndexQuantizer(table.index.scale, table.index.zero_point, 256), table=rows)
