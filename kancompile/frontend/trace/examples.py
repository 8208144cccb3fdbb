"""Rows to trace and to probe a network with: samples, and what is made of samples without leaving the model's domain.

A row that is drawn at random may lie outside the vocabulary of an embedding, or where a model raises. So where samples are at
hand, further rows take for every element a value that this element had in some sample, and elements that are not whole
numbers move a little. Integers are only exchanged among rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import NamedTensors, Values, tensors_of

EXAMPLE_ROWS = 3
"""Batch of the example that is traced and analysed: the smallest that torch.export does not specialise, and odd."""
_MOVE = 0.05
"""Standard deviation of a small move, as a share of that of the samples."""


@dataclass(frozen=True)
class Examples:
    """Valid rows of a network's inputs.

    Attributes:
        rows: at least one, every input by its name.
    """

    rows: Values

    @classmethod
    def of(cls, example: Values | Sequence[int], seed: int = 0) -> Examples:
        """Take what a user gives as an example.

        Args:
            example: ``[b, *input_shape]`` (float32), several inputs by name, or ``input_shape`` (then standard normal).
            seed: of the rows drawn.

        Raises:
            KanCompileError: the example is no batch, its shape is not positive, or it holds NaN or infinity.
        """
        if isinstance(example, NamedTensors):
            for name, value in example.tensors.items():
                _check(value, f"example input {name!r}", of_any_type=True)
            return cls(example)
        if isinstance(example, Tensor):
            _check(example, "example input", of_any_type=not example.is_floating_point())
            return cls(example.detach().cpu())
        shape = tuple(example)
        if not shape or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise KanCompileError(
                f"input_shape: found {shape!r}, expected positive sizes of one input without the batch, such as (784,)"
            )
        return cls(torch.randn(EXAMPLE_ROWS, *shape, generator=torch.Generator().manual_seed(seed)))

    def first(self, count: int = EXAMPLE_ROWS) -> Values:
        """Give the first rows; made ones behind them where there are fewer."""
        if len(self.rows) >= count:
            return self.rows[:count].clone()  # of a view torch.export traces what it is a view of as well
        made = self.made(count - len(self.rows), torch.Generator().manual_seed(0))
        if isinstance(self.rows, Tensor):
            return torch.cat([self.rows, *tensors_of(made)])
        named = zip(self.rows.tensors.items(), tensors_of(made), strict=True)
        return NamedTensors({name: torch.cat([value, more]) for (name, value), more in named})

    def made(self, count: int, generator: torch.Generator) -> Values:
        """Make rows of those at hand."""
        made = [_made(value, count, generator) for value in tensors_of(self.rows)]
        return (
            made[0] if isinstance(self.rows, Tensor) else NamedTensors(dict(zip(self.rows.tensors, made, strict=True)))
        )


def _made(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    n = len(rows)
    if not rows.is_floating_point():
        return rows[torch.randint(n, (count,), generator=generator)]
    picked = torch.randint(n, (count, *rows.shape[1:]), generator=generator)
    mixed = rows.gather(0, picked)
    spread = rows.std() if rows.numel() > 1 else torch.tensor(1.0)
    whole = (rows == rows.round()).all(0)
    moved = mixed + _MOVE * spread * torch.randn(mixed.shape, generator=generator)
    return torch.where(whole, mixed, moved)


def _check(value: Tensor, what: str, of_any_type: bool) -> None:
    if (value.dtype != torch.float32 and (value.is_floating_point() or not of_any_type)) or value.dim() < 1:
        raise _no_batch(value, what)
    if value.numel() == 0 or (value.dim() < 2 and not of_any_type):
        raise _no_batch(value, what)
    if not bool(torch.isfinite(value).all()):
        raise KanCompileError(f"{what}: found NaN or infinite values, expected finite ones; clean the data first")


def _no_batch(value: Tensor, what: str) -> KanCompileError:
    return KanCompileError(
        f"{what}: found {value.dtype} of shape {tuple(value.shape)!r}, expected float32 with a batch "
        "dimension first and at least one row; convert with .float(), add a batch with .unsqueeze(0)"
    )
