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

    Functions are "local" where they vanish far from 0, as splines and radial functions do.
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
    kind = "local " if bool((values[-2:].abs() < 1e-6 * near.abs().amax().clamp(min=1e-30)).all()) else ""
    return f"{k} {kind}function{'s' if k > 1 else ''}"
