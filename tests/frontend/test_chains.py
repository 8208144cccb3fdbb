"""Linear maps behind a KAN layer: part of it where that is cheaper, ordinary layers behind it where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.zoo import rational_kan
from kancompile.ir import Program
from tests.frontend.capturing import captured, draw


class Bumps(nn.Module):
    """A KAN layer: bumps and a SiLU of every input, one linear map."""

    def __init__(self, n_in: int, n_out: int, count: int = 5) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(-2, 2, count))
        self.weight = nn.Parameter(draw(n_out, n_in * count, seed=n_in + n_out) / n_in**0.5)
        self.base = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2))
        return bumps.flatten(-2) @ self.weight.T + self.base(nn.functional.silu(x))


class TokenBlocks(nn.Module):
    """Three times a KAN layer over tokens, a depthwise convolution, batch norm and ReLU, behind a layer norm."""

    def __init__(self, width: int = 8, side: int = 4) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(width)
        self.kan = nn.ModuleList(Bumps(width, width) for _ in range(3))
        self.depthwise = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(3))
        self.batch_norm = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        for kan, depthwise, norm in zip(self.kan, self.depthwise, self.batch_norm, strict=True):
            tokens = kan(tokens.reshape(-1, x.shape[1])).reshape(len(x), -1, x.shape[1])
            image = tokens.transpose(1, 2).reshape(len(x), -1, self.side, self.side)
            tokens = torch.relu(norm(depthwise(image))).flatten(2).transpose(1, 2)
        return tokens


class ThenConvolution(nn.Module):
    """A KAN layer of every pixel, then a convolution; beside it, on request, another KAN layer."""

    def __init__(self, groups: int, beside: bool = False) -> None:
        super().__init__()
        self.kan, self.beside = Bumps(8, 8), Bumps(8, 8) if beside else None
        self.convolution = nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        y = self.convolution(self.kan(pixels).permute(0, 3, 1, 2))
        return torch.relu(y if self.beside is None else y + self.beside(pixels).permute(0, 3, 1, 2))


class ThenLinear(nn.Module):
    """A KAN layer, a mean over tokens on request, and a linear layer."""

    def __init__(self, widths: tuple[int, int, int], mean: bool) -> None:
        super().__init__()
        self.kan, self.head, self.mean = Bumps(*widths[:2]), nn.Linear(*widths[1:]), mean

    def forward(self, x: Tensor) -> Tensor:
        y = self.kan(x)
        return self.head(y.mean(1) if self.mean else y)


class Experts(nn.Module):
    """A mixture of KAN layers by a softmax gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3)
        self.experts = nn.ModuleList(Bumps(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.gate(x), -1)
        return sum(gate[:, e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


class Residual(nn.Module):
    """KAN layers beside skip connections, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Bumps(6, 16), Bumps(16, 16), Bumps(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)
        return self.head(x + self.third(x))  # type: ignore[no-any-return]


class GroupedRational(nn.Module):
    """A rational function for each group of channels, computed with channels in groups, between linear layers."""

    def __init__(self, width: int = 12, groups: int = 3) -> None:
        super().__init__()
        self.groups, self.scale = groups, nn.Parameter(1 + draw(groups, 1, seed=4).abs())
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def rational(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        parts = x.view(b, tokens, self.groups, -1).permute(2, 0, 1, 3).reshape(self.groups, -1)
        parts = parts / (1 + self.scale * parts * parts)
        return parts.view(self.groups, b, tokens, -1).permute(1, 2, 0, 3).reshape(b, tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.rational(self.first(self.rational(x)))))


class SumOverAxes(nn.Module):
    """Layers over rows, columns and channels of one tensor, added up; the last of two sums is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.channels = Bumps(6, 6), Bumps(5, 5), Bumps(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x.transpose(1, 3)).transpose(1, 3)
        columns = self.columns(x.transpose(2, 3)).transpose(2, 3)
        return 0.5 * (rows + columns + self.channels(x))  # type: ignore[no-any-return]


class SubState(nn.Module):
    """A state that is no function of numbers but a sum of earlier outputs, which the layer reads through a matrix."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cell, self.head, self.steps = Bumps(4, 4), Bumps(4, 2), steps
        self.recurrent = nn.Parameter(0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        for step in range(self.steps):
            out = self.cell(x[:, step] + state @ self.recurrent)
            state = 0.7 * out + 0.5 * state
        return self.head(out)  # type: ignore[no-any-return]


def _weights(program: Program) -> dict[str, tuple[int, ...]]:
    return {layer.name: program.contraction(layer).matrix_shape for layer in program.layers()}


def test_depthwise_convolutions_stay_behind_their_layers() -> None:
    assert _weights(captured(TokenBlocks(), (8, 4, 4))) == {f"kan.{n}": (8, 48) for n in range(3)}


@pytest.mark.parametrize("groups", [8, 4])
def test_a_grouped_convolution_stays_behind_its_layer(groups: int) -> None:
    assert _weights(captured(ThenConvolution(groups), (8, 5, 5))) == {"kan": (8, 48)}


def test_a_sum_of_a_convolution_behind_a_layer_and_another_layer_keeps_both() -> None:
    program = captured(ThenConvolution(8, beside=True), (8, 5, 5))
    assert _weights(program) == {"kan": (8, 48), "beside": (8, 48)}


@pytest.mark.parametrize(
    ("widths", "mean", "expected"),
    [
        ((16, 32, 4), False, (4, 96)),  # a narrow head is merged
        ((8, 4, 256), False, (4, 48)),  # a wide one would be 256 x 48
        ((16, 16, 6), True, (16, 96)),  # so would a mean, 6 x (tokens * 96)
    ],
)
def test_a_head_is_merged_where_that_is_cheaper(
    widths: tuple[int, int, int], mean: bool, expected: tuple[int, int]
) -> None:
    shape = (25, widths[0]) if mean else (widths[0],)
    assert _weights(captured(ThenLinear(widths, mean), shape)) == {"kan": expected}


@pytest.mark.parametrize("width", [24, 96])
def test_experts_are_found_at_any_width(width: int) -> None:
    assert _weights(captured(Experts(width), (width,))) == {f"experts.{e}": (width, 6 * width) for e in range(3)}


def test_equal_functions_that_take_no_empty_batch_become_one() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(rational_kan.build((16, 16)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.stack([expert(x) for expert in self.experts], dim=1))

    assert _weights(captured(Stacked(), (16,))) == {"experts": (32, 16)}


def test_a_residual_network_keeps_all_layers() -> None:
    assert list(_weights(captured(Residual(), (6,)))) == ["first", "second", "third"]


def test_functions_of_groups_of_channels_are_read_for_every_token() -> None:
    assert list(_weights(captured(GroupedRational(), (7, 12))).values()) == [(24, 12), (12, 24)]


def test_terms_of_a_sum_over_several_axes_are_layers_of_their_own() -> None:
    program = captured(SumOverAxes(), (6, 5, 4))
    assert {name: shape[0] for name, shape in _weights(program).items()} == {"rows": 6, "columns": 5, "channels": 4}


@pytest.mark.slow
def test_steps_of_a_linear_state_do_not_grow() -> None:
    """One layer of all earlier steps would be cheaper for a few steps, and hold the cell's weights once for each of them."""
    few, many = (captured(SubState(steps), (steps, 4)) for steps in (5, 8))
    assert sorted(_weights(few).values()) == sorted(_weights(many).values())
    assert sum(layer.uses for layer in many.layers()) - sum(layer.uses for layer in few.layers()) >= 3
