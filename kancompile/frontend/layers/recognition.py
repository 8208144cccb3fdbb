"""The activations of ordinary networks, to tell them from learnable ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kancompile.frontend.flow import Flow, NotLowerableError
from kancompile.frontend.layers.columns import sample_points
from kancompile.frontend.layers.regions import Region
from kancompile.ir import Expansion

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


class PlainLayerError(NotLowerableError):
    """A contraction that is an ordinary linear layer or convolution: it has no functions, or activations."""


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


def refuse_plain(expansions: Sequence[Expansion], kan: bool, what: str) -> None:
    """Refuse a layer that is no KAN layer.

    Args:
        expansions: what it reads, parts that carry nothing left out.
        kan: whether one of them is more than an activation.
        what: the layer, in words.

    Raises:
        PlainLayerError: it reads features themselves, or plain activations of them.
    """
    if all(expansion.is_identity for expansion in expansions):
        raise PlainLayerError(f"plain {what}")
    if not kan:
        raise PlainLayerError(f"{what} after a plain activation")


def refuse_other_layers(flow: Flow, region: Region) -> None:
    """Leave out what this form cannot hold.

    Raises:
        PlainLayerError: a plain linear layer.
        NotLowerableError: other number types.
    """
    if all(node in flow.anchors for node in region.cuts):
        raise PlainLayerError("plain linear layer")
    for node in (*region.cuts, region.target, *(flow.track(cut).anchor for cut in region.cuts)):
        if flow.values[node].dtype != torch.float32:
            raise NotLowerableError(f"computes in {flow.values[node].dtype}, not in float32")


def is_kan(expansion: Expansion, values: Tensor) -> bool:
    """Tell a learnable or manifold expansion from the activation of an ordinary network.

    Several functions of one input, functions that differ between inputs, or one function that is no standard activation.
    """
    if expansion.k >= 2:
        return True
    if expansion.is_identity:
        return False
    functions = values.flatten(1)  # [points, inputs]
    if not torch.allclose(functions, functions[:, :1], rtol=1e-5, atol=1e-6):
        return True
    return not is_plain_activation(sample_points(), functions[:, 0])
