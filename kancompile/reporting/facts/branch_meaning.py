"""Say in words what a captured branch is: graphs name it after an operator, which tells a reader nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kancompile.ir import Expansion
from kancompile.validation import LayerPair

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "SiLU": functional.silu,
    "ReLU": functional.relu,
    "GELU": functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_FAR = 1e3
CONSTANT = "constant"


def branch_meaning(pair: LayerPair, name: str) -> str:
    """Name a known activation, or say how many functions of what kind there are.

    Functions are "local" where they vanish far from 0, as radial functions do, and a spline where they also are nowhere negative,
    leave some inputs to others, and sum to 1 over some range, as B-splines inside their knots do.
    """
    found = [branch for branch in pair.float_branches if branch.name == name]
    module = pair.float_program.module(found[0].expansion) if found else None
    if not isinstance(module, Expansion):
        return ""
    points = torch.tensor([*torch.linspace(-3, 3, 25).tolist(), -_FAR, _FAR])
    values = module.evaluate_inputs(points[:, None].expand(-1, module.n_in))[..., found[0].columns]
    k = values.shape[-1]
    near = values[:-2]
    if bool((values == values[:1]).all()):
        return CONSTANT
    if k == 1:
        for activation, function in _ACTIVATIONS.items():
            if torch.allclose(near, function(points[:-2]).reshape(-1, 1, 1).expand_as(near), rtol=1e-4, atol=1e-5):
                return activation
    if bool((values[-2:].abs() >= 1e-6 * near.abs().amax().clamp(min=1e-30)).any()):
        return f"{k} function{'s' if k > 1 else ''}"
    return f"spline of {k} functions" if _is_spline(near) else f"{k} local function{'s' if k > 1 else ''}"


def _is_spline(near: Tensor) -> bool:
    """Whether functions ``[p, n_in, k]`` are B-splines, by their values: partition of unity on finite supports."""
    sums = near.sum(2)
    inside = ((sums - 1).abs() < 1e-4).sum(0)
    return bool((near > -1e-6).all() and (inside >= 3).all() and (near == 0).any(2).all())
