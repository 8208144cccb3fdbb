"""Several tensors of one batch by name, cut and joined as one tensor is: what a model of several inputs or outputs takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NamedTensors:
    """Tensors ``[b, ...]`` of one batch size, in the order of a model's inputs or outputs.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Count the samples."""
        return len(next(iter(self.tensors.values())))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tensors in their order."""
        return iter(self.tensors.values())

    def __getitem__(self, rows: Any) -> NamedTensors:
        """Take rows of every tensor."""
        return NamedTensors({name: value[rows] for name, value in self.tensors.items()})

    def split(self, size: int) -> tuple[NamedTensors, ...]:
        """Cut into batches of ``size`` rows, the last one possibly smaller."""
        return tuple(self[start : start + size] for start in range(0, len(self), size))

    def clone(self) -> NamedTensors:
        """Copy every tensor."""
        return NamedTensors({name: value.clone() for name, value in self.tensors.items()})

    def numel(self) -> int:
        """Count the values of all tensors."""
        return sum(value.numel() for value in self)


Values = Tensor | NamedTensors
"""Samples or outputs of a model: one tensor ``[b, ...]``, or several by name."""


def tensors_of(values: Values) -> tuple[Tensor, ...]:
    """List the tensors, of one tensor itself."""
    return (values,) if isinstance(values, Tensor) else tuple(values)


def by_name(values: Values, names: Sequence[str]) -> dict[str, Tensor]:
    """Map names to tensors; one tensor takes the first name."""
    return {names[0]: values} if isinstance(values, Tensor) else dict(values.tensors)


def first_of(values: Values) -> Tensor:
    """Give the only tensor, or the first: of outputs the one that labels belong to."""
    return tensors_of(values)[0]


def joined(values: Values) -> Tensor:
    """View several outputs as one float tensor ``[b, all of them]``; one tensor is given back as it is."""
    return (
        values
        if isinstance(values, Tensor)
        else torch.cat([value.reshape(len(value), -1).float() for value in values], 1)
    )


def concatenated(parts: Sequence[Values]) -> Values:
    """Put batches one behind another."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    named = [part.tensors for part in parts if isinstance(part, NamedTensors)]
    return NamedTensors({name: torch.cat([part[name] for part in named]) for name in first.tensors})


def arrays_of(values: Values) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """View as NumPy: one array, or arrays by name."""
    if isinstance(values, Tensor):
        return np.ascontiguousarray(values.detach().numpy())
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in values.tensors.items()}
