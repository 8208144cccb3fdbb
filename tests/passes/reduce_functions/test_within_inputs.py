"""Common functions of edges: rank by error, values within it, near misses left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kancompile.frontend.capture import capture
from kancompile.ir import Contraction, Expansion, check
from kancompile.passes.reduce_functions.within_inputs import within_inputs


class Wavelets(nn.Module):
    """Edges with a Mexican hat of their own scale and place."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.rand(n_out, n_in, generator=generator))
        self.place = nn.Parameter(torch.randn(n_out, n_in, generator=generator))
        self.weight = nn.Parameter(torch.randn(n_out, n_in, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        z = ((x.unsqueeze(1) - self.place) / self.scale).square()
        return (self.weight * (1 - z) * torch.exp(-0.5 * z)).sum(-1)


def test_wavelets_get_common_functions_within_the_stated_error() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Wavelets(4, 24, generator)
    x = torch.rand(300, 4, generator=generator) * 4 - 2
    program = capture(model, x[:2])
    (layer,) = program.layers()
    before = program.module(layer.expansions[0])
    assert isinstance(before, Expansion)
    assert before.k == 24
    weight = program.module(layer.contraction).weight
    assert isinstance(weight, Tensor)
    ranks = []
    for tolerance in (1e-4, 1e-6):
        factored = within_inputs(program, x, lambda _: True, tolerance)
        check(factored)
        expansion, contraction = factored.module(layer.expansions[0]), factored.module(layer.contraction)
        assert isinstance(expansion, Expansion)
        assert isinstance(contraction, Contraction)
        exact, found = program(x).double(), factored(x).double()
        # errors of the inputs add up in amplitude at worst, so n_in times the sum of their squares bounds them
        error = float((exact - found).square().sum() / exact.square().sum())
        assert error <= tolerance * expansion.n_in + 1e-10
        ranks.append(expansion.k)
        assert within_inputs(factored, x, lambda _: True, tolerance) is factored
    assert ranks[0] < ranks[1] <= 12
    assert before.k == program.module(layer.expansions[0]).k == 24
    assert program.module(layer.contraction).weight is weight


def test_full_rank_and_shared_functions_stay() -> None:
    generator = torch.Generator().manual_seed(1)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.linspace(-2, 2, 8))
            self.linear = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.exp(-(x.unsqueeze(-1) - self.centre).square()).flatten(1))

    x = torch.rand(100, 4, generator=generator) * 4 - 2
    program = capture(Shared(), x[:2])
    assert within_inputs(program, x, lambda _: True, 1e-6) is program
    wavelets = capture(Wavelets(4, 24, generator), x[:2])
    assert within_inputs(wavelets, x, lambda _: False, 1e-6) is wavelets
    assert within_inputs(wavelets, x, lambda _: True, 1e-30) is wavelets
