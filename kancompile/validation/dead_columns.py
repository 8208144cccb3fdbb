"""Columns that contribute nothing: what "dead" means in reports and diagnoses.

A column is one function of one input. It is dead where what the file looks up for it never changes on the calibration inputs, so
that it is a constant that belongs to the bias, or where all its weights are 0 as stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.validation.layer_pairs import BranchColumns


@dataclass(frozen=True)
class DeadColumns:
    """Counts of one branch.

    Attributes:
        constant: columns that never change.
        zero_weights: columns whose weights are all 0.
        either: columns that are one or the other.
    """

    constant: int
    zero_weights: int
    either: int


def dead_columns(branch: BranchColumns, low: Tensor | None, high: Tensor | None) -> DeadColumns:
    """Count the dead columns of a branch.

    Args:
        branch: of the lowered layer.
        low, high: least and largest value that its expansion was seen to give, ``[n_in, k]``, codes of a table; ``None`` where
            nothing was seen.
    """
    groups, _, n_in, k, _ = branch.weight.shape
    zero = (branch.weight == 0).all(4).all(1).reshape(groups * n_in, k)
    constant = torch.zeros_like(zero)
    if low is not None and high is not None:
        constant = (low == high)[:, branch.columns]
    return DeadColumns(int(constant.sum()), int(zero.sum()), int((constant | zero).sum()))
