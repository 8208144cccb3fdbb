"""How a real input becomes the row number of a table."""

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
