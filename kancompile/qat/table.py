"""A table lookup that learns: exact codes forward, the slope of the functions backward.

    codes[row] = clip(rnd(start[row] + change[row] + (F(x_row) - F(start x_row)) / column scale), 0, 2^bits - 1)

``start`` are the post-training codes. ``change`` is learned where table codes are trained. The last term is there where the
index is trained: a row then stands for another input, and its functions ``F`` move along. The slope of a row is the mean
derivative of the function over the row's cell, ``(F(x_row + s/2) - F(x_row - s/2)) / s``: exact for what lies inside the cell,
kinks included, by the fundamental theorem. Where the program no longer has the functions (joint lookups), it is the difference
of neighboring rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.ir import Expansion, JointTable, TableExpansion, regroup, to_channels_last
from kancompile.qat.methods import IndexMethod, rounded

UNITS = 16.0
"""Units of the parameter in all codes of a column, so that a learning rate moves tables and weights alike."""
_WINDOWS = 24  # of a table's rows; codes that were rounded together leave differences over fewer rows noisy


class _LookUp(torch.autograd.Function):
    """``codes[rows]``, with gradients to the codes and, through the slope of the row, to the real input."""

    @staticmethod
    def forward(ctx, x, rows, codes, slope):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, slope)
        ctx.count = len(codes)
        return codes.index_select(0, rows.flatten()).reshape(*rows.shape, codes.shape[1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, slope = ctx.saved_tensors
        to_x = to_codes = None
        if ctx.needs_input_grad[0]:
            found = slope.index_select(0, rows.flatten()).reshape(grad.shape)
            to_x = (grad * found).sum(-1)
        if ctx.needs_input_grad[2]:
            empty = grad.new_zeros(ctx.count, grad.shape[-1])
            to_codes = empty.index_add_(0, rows.flatten(), grad.reshape(-1, grad.shape[-1]))
        return to_x, None, to_codes, None


class TrainedTable(nn.Module):
    """The twin of a table.

    Attributes:
        change: float32 ``[T * levels, k]`` in sixteenths of all codes, 0 to begin with; ``None`` where codes are not trained.
        differentiates: where slopes come from, ``"functions"`` or ``"rows"``.
    """

    start: Tensor
    scale: Tensor
    nominal: Tensor
    picks: Tensor | None
    first_row: Tensor | None
    functions: Expansion | None
    index: IndexMethod

    def __init__(
        self, table: TableExpansion, index: IndexMethod, functions: Expansion | None, trains_codes: bool
    ) -> None:
        """Take the table, the index that it shares with what is in front, and its functions where they are known."""
        super().__init__()
        self.table, self.in_shape, self.n_in, self.k = _TableFacts(table), table.in_shape, table.n_in, table.k
        self.__dict__["index"] = index  # owned by the whole module, since others share it
        self.__dict__["functions"] = functions  # constants, which no state needs to hold
        self.change = nn.Parameter(torch.zeros(table.table.shape)) if trains_codes else None
        levels, tables = table.index.levels, table.n_tables
        owner = torch.zeros(1, dtype=torch.int64)
        if table.first_row is not None:
            owner = torch.stack([(table.first_row == n * levels).nonzero()[0, 0] for n in range(tables)])
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("start", table.table.float(), persistent=False)
        self.register_buffer("scale", table.scale.repeat_interleave(levels, 0), persistent=False)
        self.register_buffer("picks", table.picks, persistent=False)
        self.register_buffer("first_row", table.first_row, persistent=False)
        self.register_buffer("nominal", torch.zeros(0), persistent=False)
        self.register_buffer("known_slope", torch.zeros(0), persistent=False)
        if functions is not None:
            self.nominal, slope = self._functions_at_rows()
        else:
            slope = _slope_of_rows(table.table.float().reshape(tables, levels, table.k)).flatten(0, 1)
            slope = slope / table.index.scale
        self.known_slope = slope

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.functions is not None:
            self.functions._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def differentiates(self) -> str:
        """Say where slopes come from."""
        return "rows" if self.functions is None else "functions"

    @property
    def moves(self) -> bool:
        """Whether its rows may come to stand for other inputs."""
        return self.functions is not None and any(one.requires_grad for one in self.index.parameters())

    @torch.no_grad()
    def _functions_at_rows(self) -> tuple[Tensor, Tensor]:
        """Evaluate functions at rows, and mean slopes over their cells in codes for a unit of the input, ``[T * levels, k]``."""
        assert self.functions is not None
        index, owner = self.index, self.get_buffer("owner")
        step = index.step()
        cells = torch.arange(2 * index.most + 3, device=step.device) / 2 - 0.5
        points = (cells - index.zero_point()) * step
        values = _evaluated(self.functions, points, owner if self.first_row is not None else None)
        at_rows, borders = values[:, 1::2], values[:, ::2]
        slope = (borders[:, 1:] - borders[:, :-1]).flatten(0, 1) / (self.scale * step)
        return at_rows.flatten(0, 1), slope

    def codes_and_slope(self) -> tuple[Tensor, Tensor]:
        """Return codes ``[T * levels, k]``, whole numbers in float32, and the slope of each row."""
        codes, slope = self.start, self.known_slope
        if self.moves:
            at_rows, slope = self._functions_at_rows()
            codes = codes + (at_rows - self.nominal) / self.scale
        if self.change is not None:
            codes = codes + (self.table.codes / UNITS) * self.change
        return rounded(codes.clamp(0, self.table.codes - 1)), slope

    def forward(self, x: Tensor) -> Tensor:
        """Map real values to float codes ``[b, *, n_in, k]``; behind a contraction they have passed the index already."""
        kind, index = self.table.input, self.index
        if not self.table.channels_first:
            x = regroup(x, self.table.read_shape)
        if kind == "scaled":
            x, rows = self._in_rows(x)
        elif kind == "float":
            rows = index.floored(x)
            x = index.through(x, rows)
        else:
            x = index(x) if kind == "real" else x
            rows = index.rows(x.detach())
        if self.picks is not None:
            x, rows = x.index_select(-1, self.picks), rows.index_select(-1, self.picks)
        elif self.table.channels_first:
            x, rows = to_channels_last(x), to_channels_last(rows)
        rows = rows.long()
        if self.first_row is not None:
            rows = rows + self.first_row
        codes, slope = self.codes_and_slope()
        found: Tensor = _LookUp.apply(x, rows, codes, slope)  # type: ignore[no-untyped-call]
        return found

    def _in_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Read values in units of rows, 0.5 included; their range is not trained."""
        start = self.table.index
        rows = x.detach().clamp(0, start.levels - 1).trunc()
        return ((x - 0.5 - start.zero_point) * start.scale).clamp(start.low, start.high), rows

    @torch.no_grad()
    def quantized(self, table: TableExpansion) -> TableExpansion:
        """Return ``table``, the post-training one, with the codes and the index as they are now."""
        codes = self.codes_and_slope()[0].cpu().to(torch.uint8)
        index = self.index.quantizer()
        if torch.equal(codes, table.table) and index == table.index:
            return table
        return table.replace(table=codes, index=index)


class TrainedJoint(nn.Module):
    """The twin of a joint table: the sum of the lookups of its members, whose codes and index stay."""

    def __init__(self, table: JointTable, index: IndexMethod) -> None:
        super().__init__()
        self.in_shape, self.n_in, self.k = table.in_shape, table.n_in, table.k
        self.members = nn.ModuleList(TrainedTable(part, index, None, False) for part in table.by_member())

    def forward(self, x: Tensor) -> Tensor:
        """Map what it reads to float codes ``[b, c, 1]``."""
        codes = [part(x).transpose(1, 2).reshape(len(x), -1, 1) for part in self.members]
        return torch.stack(codes).sum(0)

    def quantized(self, table: JointTable) -> JointTable:
        """Return ``table``, which training does not change."""
        return table


class _TableFacts:
    """What the twin needs to know of a table, without its tensors."""

    def __init__(self, table: TableExpansion) -> None:
        self.input, self.index, self.codes = table.input, table.index, 1 << table.bits
        self.read_shape, self.channels_first = tuple(table.read_shape), table.channels_first


def _evaluated(functions: Expansion, points: Tensor, owner: Tensor | None) -> Tensor:
    """Evaluate functions at points, ``[T, n, k]``; ``owner`` is an input of each table, ``None`` where all share one."""
    if owner is None:
        return functions.sample_shared(points)[None]
    return functions.sample_inputs(points)[:, owner].transpose(0, 1)


def _slope_of_rows(codes: Tensor) -> Tensor:
    """Differences over some rows to either side, in codes per row, for codes ``[T, levels, k]``."""
    levels = codes.shape[1]
    rows, reach = torch.arange(levels), max(1, levels // _WINDOWS)
    before, after = (rows - reach).clamp(min=0), (rows + reach).clamp(max=levels - 1)
    return (codes[:, after] - codes[:, before]) / (after - before)[:, None]


def constant_functions(slopes: Sequence[Tensor]) -> bool:
    """Whether no function has a finite slope other than 0."""
    return not any(bool((slope.isfinite() & (slope != 0)).any()) for slope in slopes)
