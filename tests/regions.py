"""Float expansions built by hand from plain functions, so that lowering is tested without a frontend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from examples.zoo.efficient_kan import b_spline_basis
from kancompile.ir import Branch, Contraction, Expansion, Program


class Pointwise(nn.Module):
    """Map ``[b, n]`` to ``[b, n, k]`` by a function of constants that the region holds."""

    def __init__(self, function: Callable[..., Tensor], *constants: Tensor) -> None:
        super().__init__()
        self.function = function
        self.count = len(constants)
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant{number}", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(self.get_buffer(f"constant{number}") for number in range(self.count)))


def branch(name: str, n_in: int, k: int, function: Callable[..., Tensor], *constants: Tensor) -> Branch:
    """Trace a function into the region of a branch."""
    return Branch(name, fx.symbolic_trace(Pointwise(function, *constants)), torch.arange(n_in * k).reshape(n_in, k))


def spline(knots: Tensor, order: int = 3) -> Branch:
    """B-splines on the knots of each input, ``[n_in, m]``, as efficient-KAN evaluates them."""
    n_in, k = knots.shape[0], knots.shape[1] - order - 1
    return branch("spline", n_in, k, lambda x, constant: b_spline_basis(x, constant, order), knots)


def silu(n_in: int) -> Branch:
    return branch("silu", n_in, 1, nn.functional.silu)


def uniform_knots(n_in: int, grid: int = 5, order: int = 3, low: float = -1.0, high: float = 1.0) -> Tensor:
    step = (high - low) / grid
    return (torch.arange(-order, grid + order + 1) * step + low).repeat(n_in, 1)


def adaptive_knots(n_in: int, count: int = 12, least_gap: float = 1e-4, seed: int = 0) -> Tensor:
    """Knots of an own spacing for every input, some of them ``least_gap`` apart."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(n_in, count - 1, generator=generator) * 0.5 + 0.05
    gaps[torch.arange(n_in), torch.arange(n_in) % (count - 1)] = least_gap
    return torch.cat([torch.full((n_in, 1), -1.7), gaps], 1).cumsum(1)


def float_program(expansions: list[Expansion], n_out: int = 4, seed: int = 0) -> Program:
    """Build one layer for every expansion, one behind the other; each is as wide as the next one reads."""
    generator = torch.Generator().manual_seed(seed)
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    widths = [expansion.n_in for expansion in expansions[1:]] + [n_out]
    for number, (expansion, width) in enumerate(zip(expansions, widths, strict=True)):
        columns = expansion.n_in * expansion.k
        weight = torch.randn(width, columns, generator=generator) / columns**0.5
        bias = torch.randn(width, generator=generator)
        root[f"layer{number}_expand"] = expansion
        root[f"layer{number}_contract"] = Contraction(f"layers.{number}", weight, bias, (width,))
        value = graph.call_module(f"layer{number}_expand", (value,))
        value = graph.call_module(f"layer{number}_contract", (value,))
    graph.output(value)
    return Program(fx.GraphModule(root, graph), expansions[0].anchor_shape)
