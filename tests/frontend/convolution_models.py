"""Convolutional models that capture is tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kancompile.ir import Contraction, Program
from tests.frontend.capturing import draw

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw parameters and statistics from a seed."""
    for number, (name, value) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        drawn = draw(*value.shape, seed=seed + number) if value.dim() else value
        with torch.no_grad():
            if "var" in name:
                value.copy_(drawn.abs() + 0.5)
            elif value.dim():
                value.copy_(drawn / max(1, value[0].numel() if value.dim() > 1 else 1) ** 0.5)
    return module


def powers(x: Tensor, degree: int, order: str = "degree") -> Tensor:
    """Concatenate powers of ``tanh(x)`` along the channels, degree-major or feature-major."""
    u = torch.tanh(x)
    basis = [u ** (power + 1) for power in range(degree)]
    return torch.cat(basis, dim=1) if order == "degree" else torch.stack(basis, dim=2).flatten(1, 2)


def chebyshev(x: Tensor, degree: int) -> Tensor:
    """Concatenate the polynomials T_0 = 1 to T_degree of ``tanh(x)``, degree-major."""
    u = torch.tanh(x)
    basis = [torch.ones_like(u), u]
    while len(basis) <= degree:
        basis.append(2 * u * basis[-1] - basis[-2])
    return torch.cat(basis, dim=1)


class PowersConv(nn.Module):
    """A convolution of powers of the input."""

    def __init__(self, n_in: int = 4, n_out: int = 6, kernel: int = 3, order: str = "degree", **moves: int) -> None:
        super().__init__()
        self.order = order
        dims = moves.pop("dims", 2)
        self.conv = CONVOLUTIONS[dims](3 * n_in, n_out, kernel, **moves)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(powers(x, 3, self.order))


class Wrapped(nn.Module):
    """Modules and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(modules)
        for name, module in modules.items():
            self.add_module(name, seeded(module, len(name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(self.get_submodule(name) for name in self.names))


def convolution(program: Program, layer: int = 0) -> Contraction:
    """Give the convolution of a layer."""
    found = program.module(program.layers()[layer].contraction)
    assert isinstance(found, Contraction)
    return found
