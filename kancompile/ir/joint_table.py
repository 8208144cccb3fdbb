"""Tables whose row number several inputs share, so that one lookup serves all of them.

    phi[b, c] ~ scale[c] * sum_j parts[j, c, row(x[b, members[j, c]])] + offset[c]

A column is a sum of one function of each of its members. The codes of the sum are sums of codes, so the table of all
combinations of rows, which is what a target looks up, follows from the parts exactly, and a file stores only those.

Columns stand in planes: the columns ``c``, ``c + w``, ``c + 2 w``, ... of ``w`` words have the same members, and one number may
hold their codes (``kancompile.ir.packed_codes``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kancompile.ir.basis_parts import BasisParts
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.table import TableExpansion


class JointTable(TableExpansion):
    """Columns of functions of several inputs each; to a contraction every column is an input with one function.

    Attributes:
        read_shape: of what it reads, ``(n,)``.
        members: int64 ``[m, w]``, the inputs that share the index of a word.
        parts: uint8 ``[m, k, w, levels]``, codes of the functions of each member; sums of them stay below 256.
        made_of: integers that the parts follow from, where those are stored in their place.
    """

    members: Tensor
    parts: Tensor

    def __init__(
        self,
        read_shape: tuple[int, ...],
        index: IndexQuantizer,
        members: Tensor,
        parts: Tensor,
        scale: Tensor,
        offset: Tensor,
        name: str,
        input: str = "real",
        made_of: BasisParts | None = None,
    ) -> None:
        """Take ``scale`` and ``offset`` of every column, float32 ``[k * w, 1]``."""
        columns, combinations = parts[0, :, :, 0].numel(), index.levels ** len(parts)
        first = (torch.arange(columns) * combinations).to(torch.int32)
        super().__init__((columns,), index, _combined(parts), first, scale, offset, (1,), (name,), input)
        self.read_shape, self.name, self.made_of = tuple(read_shape), name, made_of
        self.register_buffer("members", members)
        self.register_buffer("parts", parts)

    @property
    def anchor_shape(self) -> tuple[int, ...]:
        """Shape of what it reads, without the batch."""
        return self.read_shape

    @property
    def is_of_each(self) -> bool:
        """Its columns belong to words."""
        return False

    @property
    def rows(self) -> int:
        """Rows of the table of a column: all combinations of rows of its members."""
        return int(self.index.levels ** len(self.parts))

    def fields(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        names = ("read_shape", "index", "members", "parts", "scale", "offset", "name", "input", "made_of")
        return {name: getattr(self, name) for name in names}

    def replace(self, **fields: Any) -> JointTable:
        """Return the same table with some arguments of the constructor exchanged."""
        return JointTable(**(self.fields() | fields))

    def by_member(self) -> list[MemberTable]:
        """Return for every member the table of its functions, a word an input of ``k`` functions."""
        planes, words = self.parts.shape[1:3]
        first = (torch.arange(words) * self.index.levels).to(torch.int32)
        scale, offset = (value.reshape(planes, words).T.contiguous() for value in (self.scale, self.offset))
        return [
            MemberTable(
                picks,
                self.read_shape,
                in_shape=(words,),
                index=self.index,
                table=part.permute(1, 2, 0).reshape(-1, planes).contiguous(),
                first_row=first,
                scale=scale,
                offset=offset,
                branch_sizes=(planes,),
                branch_names=(self.name,),
                input=self.input,
            )
            for picks, part in zip(self.members, self.parts, strict=True)
        ]

    def rescaled(self, fraction: Tensor, zero_point: int) -> JointTable:
        """Return the table whose columns use a fraction ``[c, 1]`` of their codes; nothing is padded, no code stands for 0."""
        of_plane = fraction.reshape(1, *self.parts.shape[1:3], 1)
        parts = torch.round(self.parts.float() * of_plane).to(torch.uint8)
        return self.replace(parts=parts, scale=self.scale / fraction, made_of=None)

    def stored_bytes(self) -> int:
        """Count the bytes of the parts, or of what they are made of."""
        return self.parts.numel() if self.made_of is None else self.made_of.stored_bytes()

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        members, words = self.members.shape
        used = int(torch.unique(self.members).numel())
        return super().describe() | {"words": words, "members": members, "inputs_read": used, "tables": words}

    def in_words(self) -> str:
        """Give the inputs that share an index, and their rows."""
        index, (members, words) = self.index, self.members.shape
        span = f"{index.levels} rows over {index.low:.4g} ... {index.high:.4g} for each input"
        return f"{words} lookups of {members} inputs together, {self.n_in} functions: {span}"

    def form(self) -> str:
        """Give rows and range, and what it reads."""
        index, (members, words) = self.index, self.members.shape
        rows = f"{words} words of {members} inputs with {index.levels} rows each"
        return f"{rows}, {index.low:.6g} ... {index.high:.6g}, reads {self.input}"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, n]`` to table codes, uint8 ``[b, c, 1]``."""
        codes: Tensor = torch.ops.kancompile.expand_joint(self.to_index(x), self.members, self.parts)
        return codes


class MemberTable(TableExpansion):
    """What one member of every word adds to a joint table: a table that looks up some of the inputs, in any order."""

    def __init__(self, picks: Tensor, read_shape: tuple[int, ...], **fields: Any) -> None:
        super().__init__(**fields)
        self.read_shape = tuple(read_shape)
        self.picks = picks

    def fields(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return super().fields() | {"picks": self.picks, "read_shape": self.read_shape}

    def replace(self, **fields: Any) -> MemberTable:
        """Return the same table with some arguments of the constructor exchanged."""
        return MemberTable(**(self.fields() | fields))


def _combined(parts: Tensor) -> Tensor:
    """Add the codes of all combinations of rows, ``[k * w * levels^m, 1]``, the last member's rows innermost."""
    planes, words = parts.shape[1:3]
    total = parts[0].to(torch.int32)
    for part in parts[1:]:
        total = (total[..., :, None] + part[..., None, :]).reshape(planes, words, -1)
    return total.to(torch.uint8).reshape(-1, 1)
