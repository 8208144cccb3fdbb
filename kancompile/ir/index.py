"""How a real input becomes the row number of a table, and in which form a contraction hands its outputs to a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kancompile.ir.operators  # noqa: F401  (registers the operators that torch.ops.kancompile names)


@dataclass(frozen=True)
class IndexQuantizer:
    """How a real input becomes a row number of a table: ``levels`` rows, ``scale`` input units apart.

    Row ``r`` stands for the input ``(r - zero_point) * scale``; inputs beyond the first and last row use that row.
    Rounding is that of ONNX QuantizeLinear; between two layers, tables of more than 256 rows are indexed in float
    instead (see ``operators.floor_index``), which differs at ties only.
    """

    scale: float
    zero_point: int
    levels: int

    @property
    def is_8_bit(self) -> bool:
        """Whether row numbers fit uint8, so that an integer kernel can produce them."""
        return self.levels <= 256

    @property
    def low(self) -> float:
        """Input of the first row."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Input of the last row."""
        return (self.levels - 1 - self.zero_point) * self.scale

    def to_rows(self) -> tuple[float, float]:
        """Give multiplier and offset with which ``floor(x * multiplier + offset)`` is the row number of ``x``."""
        return 1.0 / self.scale, self.zero_point + 0.5

    def rows(self) -> Tensor:
        """Give the input that each row stands for, float64 ``[levels]``."""
        return (torch.arange(self.levels, dtype=torch.float64) - self.zero_point) * self.scale

    def real(self, index: Tensor) -> Tensor:
        """Give the float32 inputs that uint8 row numbers stand for."""
        x: Tensor = torch.ops.kancompile.dequantize_index(index, self.scale, self.zero_point)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize real inputs to row numbers (uint8 up to 256 levels, else int32)."""
        index: Tensor = torch.ops.kancompile.quantize_index(x, self.scale, self.zero_point, self.levels)
        return index


@dataclass(frozen=True)
class HandOver:
    """The form in which a contraction yields its outputs.

    Attributes:
        kind: ``"real"`` values, ``"rows"``: row numbers of the table behind, or ``"scaled"``: real values in units of
            its rows, 0.5 included, so that their floor is the row number.
        index: the quantizer whose rows are meant; of ``"real"`` values the one that they have passed, ``None`` where they
            are not rounded.
    """

    kind: str = "real"
    index: IndexQuantizer | None = None

    @property
    def quantizer(self) -> IndexQuantizer | None:
        """The quantizer that an output has passed, ``None`` where it is not rounded."""
        return None if self.kind == "scaled" else self.index

    @property
    def unit(self) -> float:
        """Real units of one unit of unrounded outputs; below 1 where those are in units of rows."""
        return self.index.scale if self.kind == "scaled" and self.index is not None else 1.0

    def real(self, y: Tensor) -> Tensor:
        """Give the real values that outputs of this form stand for."""
        if self.kind == "real" or self.index is None:
            return y
        if self.kind == "rows":
            return self.index.real(y)
        multiplier, offset = self.index.to_rows()
        return (y - offset) / multiplier

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind} of {self.index.levels}"


REAL = HandOver()
"""Real values as they were computed."""


def rows_of(index: IndexQuantizer) -> HandOver:
    """Give the form of row numbers that ``index`` makes."""
    return HandOver("rows", index)
