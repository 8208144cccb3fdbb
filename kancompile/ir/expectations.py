"""What nodes verify of themselves: a number or a tensor that is not as expected is an error that names its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.errors import KanCompileError


def expect(layer: str, what: str, found: int, expected: int) -> None:
    """Compare a number of a layer.

    Raises:
        KanCompileError: it is another one.
    """
    if found != expected:
        raise KanCompileError(f"layer {layer!r}: found {found} {what}, expected {expected}")


def expect_finite(layer: str, what: str, value: Tensor) -> None:
    """Look for NaN and infinite values.

    Raises:
        KanCompileError: there are some.
    """
    if not bool(torch.isfinite(value).all()):
        raise KanCompileError(f"layer {layer!r}: {what} has NaN or infinite values; retrain or repair the checkpoint")
