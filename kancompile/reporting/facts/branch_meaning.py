"""Say in words what a captured branch is: graphs name it after an operator, which tells a reader nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kancompile.ir import AnyExpansion, Expansion
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
MIXTURES = "mixtures"
"""How ``mix-functions`` calls the branch that it makes: some functions in place of many, and a constant where it pads."""


def branch_meaning(pair: LayerPair, name: str) -> str:
    """Say what a branch of a layer is; empty where a pass made it in a way that has no words."""
    found = [branch for branch in pair.float_branches if branch.name == name]
    if found:
        return functions_meaning(pair.float_program.module(found[0].expansion), found[0].columns)
    mixed = [branch for branch in pair.branches if branch.name == name == MIXTURES]
    return f"{mixed[0].columns.stop - mixed[0].columns.start} mixed functions" if mixed else ""


def functions_meaning(module: nn.Module, columns: slice) -> str:
    """Name a known activation, or say how many functions of what kind some columns of an expansion are.

    Functions are "local" where they vanish far from 0, as radial functions do, and a spline where they also are nowhere negative,
    leave some inputs to others, and sum to 1 over some range, as B-splines inside their knots do.
    """
    if not isinstance(module, Expansion):
        return ""
    points = torch.tensor([*torch.linspace(-3, 3, 25).tolist(), -_FAR, _FAR])
    values = module.evaluate_inputs(points[:, None].expand(-1, module.n_in))[..., columns]
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


def meanings(module: AnyExpansion) -> list[str]:
    """Say what each branch of an expansion is, in order; an empty text where nothing is known of it."""
    found, start = [], 0
    for _, k in module.branch_functions:
        found.append(functions_meaning(module, slice(start, start + k)))
        start += k
    return found


def _is_spline(near: Tensor) -> bool:
    """Whether functions ``[p, n_in, k]`` are B-splines, by their values: partition of unity on finite supports."""
    sums = near.sum(2)
    inside = ((sums - 1).abs() < 1e-4).sum(0)
    return bool((near > -1e-6).all() and (inside >= 3).all() and (near == 0).any(2).all())
