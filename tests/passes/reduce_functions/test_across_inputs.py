"""Functions of single edges brought to functions that all inputs share, or left alone with a reason."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn

from kancompile.ir import Branch, Contraction, Expansion, Geometry, Program, check, distinct_inputs
from kancompile.passes.reduce_functions.across_inputs import across_inputs
from tests.regions import branch, silu

RUN = partial(across_inputs, applies=lambda name: True, share=1e-6)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_layer(branches: list[Branch], weight: Tensor) -> Program:
    n_in = branches[0].position.shape[0]
    contraction = Contraction("kan", weight, torch.zeros(len(weight)), (len(weight),))
    return program_of(Expansion((n_in,), branches), contraction, (n_in,))


def program_of(expansion: Expansion, contraction: nn.Module, shape: tuple[int, ...]) -> Program:
    graph = fx.Graph()
    value = graph.call_module("expand", (graph.placeholder("x"),))
    graph.output(graph.call_module("contract", (value,)))
    return Program(fx.GraphModule({"expand": expansion, "contract": contraction}, graph), shape)


def wavelets(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Mexican hats, ``[..., n_in] -> [..., n_in, n_out]`` with a shift and a scale on each edge."""
    t = (x.unsqueeze(-1) - shift) / scale
    return (t * t - 1) * torch.exp(-0.5 * t * t)


def wavelet_layer(n_in: int, n_out: int) -> Program:
    """Every function of an input belongs to one output: weights are zero elsewhere."""
    shift, scale = 0.3 * draw(n_in, n_out, seed=1), 1 + 0.2 * draw(n_in, n_out, seed=2).tanh()
    weight = torch.diag_embed(draw(n_in, n_out, seed=3)).permute(1, 0, 2).reshape(n_out, n_in * n_out)
    base = draw(n_out, n_in, seed=4) / 10
    both = torch.cat([weight.reshape(n_out, n_in, n_out), base.unsqueeze(-1)], dim=2).flatten(1)
    return one_layer([branch("wavelet", n_in, n_out, wavelets, shift, scale), silu(n_in)], both)


def relative_error(program: Program, after: Program, x: Tensor) -> float:
    expected = program(x)
    return float((after(x) - expected).square().mean().sqrt() / (expected - expected.mean(0)).square().mean().sqrt())


def test_wavelets_of_edges_share_a_few_functions() -> None:
    program = wavelet_layer(8, 24)
    after = RUN(program, draw(500, 8, seed=5))
    check(after)
    expansion = after.module("expand")
    assert isinstance(expansion, Expansion)
    shared, base = (int(part.k) for part in expansion.branches)
    assert (shared <= 12, base) == (True, 1)
    assert len(distinct_inputs(expansion, -3.0, 3.0)[0]) == 1
    # other inputs than those that were measured; the tolerance is 1e-3 of the spread, inputs beyond the data a little more
    assert relative_error(program, after, draw(2000, 8, seed=6)) < 2e-3
    assert "24 functions of each input, different for every input, factorized into" in after.notes[-1]
    assert RUN(after, draw(500, 8, seed=5)) is after


def test_exact_rank_is_found() -> None:
    mixture = draw(5, 9, 3, seed=7)

    def mixed(x: Tensor, mixture: Tensor) -> Tensor:
        basis = torch.stack([torch.sin(2 * x), torch.tanh(x), torch.exp(-x * x)], dim=-1)
        return torch.einsum("...nr,nkr->...nk", basis, mixture)

    program = one_layer([branch("mixed", 5, 9, mixed, mixture)], draw(4, 45, seed=8))
    after = RUN(program, draw(300, 5, seed=9))
    assert after.module("expand").k == 3
    assert after.module("contract").weight.shape == (4, 15)
    assert relative_error(program, after, draw(1000, 5, seed=10)) < 1e-4


def test_functions_that_share_nothing_stay() -> None:
    frequency = torch.arange(1, 41).reshape(5, 8).float()
    functions = branch("waves", 5, 8, lambda x, w: torch.sin(x.unsqueeze(-1) * w), frequency)
    program = one_layer([functions], draw(6, 40, seed=11))
    x = 3 * draw(400, 5, seed=12)
    after = RUN(program, x)
    assert after.module("expand") is program.module("expand")
    assert "layer 'kan': 8 functions of each input stay as they are: 6 shared ones leave an error of" in after.notes[-1]
    assert RUN(after, x) is after


def test_shared_functions_are_left_alone() -> None:
    functions = branch("shared", 5, 8, lambda x, w: torch.sin(x.unsqueeze(-1) * w), torch.arange(1.0, 9.0))
    program = one_layer([functions], draw(6, 40, seed=11))
    assert RUN(program, draw(100, 5, seed=12)) is program


def test_layers_can_be_left_out() -> None:
    program = wavelet_layer(4, 8)
    assert across_inputs(program, draw(100, 4, seed=1), lambda name: name != "kan", 1e-6) is program


def test_jumps_at_pixels_are_exact() -> None:
    """Inputs on a lattice stand on points of the table, so a jump right at a pixel costs nothing."""
    heights = draw(4, 12, 5, seed=13)

    def steps(x: Tensor, heights: Tensor) -> Tensor:
        cell = (2 * x + 2).floor().clamp(0, 4).long()
        feature = torch.arange(x.shape[-1])
        return heights[feature, :, cell]

    program = one_layer([branch("steps", 4, 12, steps, heights)], draw(3, 48, seed=14))
    pixels = torch.randint(0, 9, (200, 4), generator=torch.Generator().manual_seed(15)) / 4 - 1
    after = RUN(program, pixels)
    assert after.module("expand").k <= 6
    torch.testing.assert_close(after(pixels), program(pixels), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_padded_convolution(groups: int) -> None:
    channels, k, side = 4, 8, 5
    shift = 0.3 * draw(channels, k, seed=16)

    def functions(x: Tensor, shift: Tensor) -> Tensor:
        return wavelets(x.movedim(1, -1), shift, torch.ones_like(shift))  # [b, h, w, channels, k]

    region = branch("wavelet", 1, 1, functions, shift).region
    position = torch.arange(side * side * channels * k).reshape(side, side, channels, k)
    expansion = Expansion((channels, side, side), [Branch("wavelet", region, position)], channels_first=True)
    weight = draw(6, channels * k // groups, 3, 3, seed=17)
    geometry = Geometry((1, 1), (1, 1), (1, 1), groups)
    contraction = Contraction("conv", weight, torch.zeros(6), (6, side, side), geometry)
    program = program_of(expansion, contraction, (channels, side, side))
    after = RUN(program, draw(60, channels, side, side, seed=18))
    check(after)
    assert after.module("expand").k < k
    assert relative_error(program, after, draw(60, channels, side, side, seed=19)) < 2e-3
