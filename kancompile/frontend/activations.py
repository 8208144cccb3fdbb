"""The activations of ordinary networks, to tell them from learnable ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_STANDARD: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.relu,
    functional.relu6,
    functional.silu,
    functional.gelu,
    lambda x: functional.gelu(x, approximate="tanh"),
    lambda x: x * torch.sigmoid(1.702 * x),
    torch.sigmoid,
    torch.tanh,
    functional.elu,
    functional.selu,
    functional.celu,
    functional.softplus,
    functional.softsign,
    functional.logsigmoid,
    functional.hardtanh,
    functional.hardsigmoid,
    functional.hardswish,
    functional.mish,
    functional.tanhshrink,
    functional.hardshrink,
    functional.softshrink,
    torch.abs,
    torch.square,
)


def is_plain_activation(points: Tensor, values: Tensor) -> bool:
    """Tell whether sampled values are those of a standard activation, a leaky ReLU of any slope, or an affine map.

    A constant factor or offset on the function does not matter: it belongs to the linear layer behind.

    Args:
        points: where the function was sampled, ``[n]``, on both sides of 0.
        values: its values, ``[n]``.
    """
    sides = torch.stack([points.clamp(min=0), points.clamp(max=0), torch.ones_like(points)], dim=1)
    if _explains(sides, values):
        return True
    return any(
        _explains(torch.stack([activation(points), torch.ones_like(points)], dim=1), values) for activation in _STANDARD
    )


def _explains(basis: Tensor, values: Tensor) -> bool:
    """Whether values are a linear combination of columns, to 1e-5 of their size."""
    fit = torch.linalg.lstsq(basis.double(), values.double().unsqueeze(1), driver="gelsd").solution
    residual = (basis.double() @ fit).squeeze(1) - values.double()
    return bool(residual.abs().max() <= 1e-5 * max(1e-12, float(values.abs().max())))
