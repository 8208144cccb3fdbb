"""An axis that a layer does not mix is none of its inputs, wherever it stands and whatever stands around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from examples.zoo.fast_kan import FastKANLayer
from kancompile.frontend import capture
from kancompile.frontend.flow import Axes
from kancompile.ir import NamedTensors, Program
from kancompile.runtimes import RuntimeModel
from tests.frontend.capturing import captured, contraction, draw
from tests.interfaces import Rbf


def weights(program: Program) -> list[tuple[int, ...]]:
    """Give the shapes of the weights of all layers."""
    return [contraction(program, number).matrix_shape for number in range(len(program.layers()))]


class Along(nn.Module):
    """A KAN layer over some axes of a tensor, which are brought to the end and back."""

    def __init__(self, shape: Sequence[int], order: Sequence[int], mixed: int) -> None:
        super().__init__()
        self.order, self.mixed = [0, *(1 + axis for axis in order)], mixed
        self.n = math.prod(shape[axis] for axis in order[len(order) - mixed :])
        self.kan = Rbf(self.n, self.n)

    def forward(self, x: Tensor) -> Tensor:
        moved = x.permute(self.order)
        y = self.kan(moved.flatten(len(self.order) - self.mixed)).reshape(moved.shape)
        return y.permute([self.order.index(axis) for axis in range(len(self.order))]).abs()


@pytest.mark.parametrize(
    ("shape", "order", "mixed"),
    [
        ((3, 4), (1, 0), 1),
        ((3, 4, 2), (0, 2, 1), 1),
        ((3, 4, 2), (2, 0, 1), 2),
        ((3, 1, 2), (1, 2, 0), 2),
        ((2, 3, 4, 2), (3, 1, 0, 2), 1),
        ((2, 3, 2, 3), (2, 0, 3, 1), 2),
        ((3, 2, 1, 4), (3, 0, 2, 1), 3),
    ],
)
def test_a_layer_over_any_axes_is_one_map_for_all_others(
    shape: tuple[int, ...], order: tuple[int, ...], mixed: int
) -> None:
    model = Along(shape, order, mixed)
    assert weights(capture(model, draw(3, *shape, seed=1))) == [(model.n, 7 * model.n)]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5).flatmap(
        lambda s: st.tuples(st.just(s), st.permutations(range(len(s))))
    )
)
@settings(deadline=None, derandomize=True)
def test_joined_axes_read_the_same_order(drawn: tuple[list[int], list[int]]) -> None:
    sizes, order = drawn
    axes, x = Axes.joined(sizes, order), torch.arange(2 * math.prod(sizes)).reshape(2, *sizes)
    expected = x.permute(0, *(1 + axis for axis in order))
    ordered = axes(x, expected.shape[1:])
    assert torch.equal(ordered, expected)
    assert torch.equal(axes.inverse(ordered, sizes), x)
    assert axes.stays == torch.equal(expected.flatten(), x.flatten())
    assert all(size > 1 for size in axes.sizes)


class TwoLayouts(nn.Module):
    """A spline branch on the norm of tokens and a base branch on the tokens, which are pixels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kan = nn.Conv2d(3, 8, 3, padding=1), FastKANLayer(8, 6, torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(torch.relu(self.conv(x)).flatten(2).transpose(1, 2)).sin()  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    """Tokens are mixed, then channels, each behind a norm and beside a straight arm."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.over_tokens, self.over_channels = Rbf(tokens, tokens), Rbf(channels, channels)
        self.head = Rbf(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.over_channels(self.norms[1](x))).mean(1))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """A KAN layer over the pixels of every window of an image, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = Rbf(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.view(-1, 4, 2, 3, 2, 3).permute(0, 1, 3, 2, 4, 5)
        y = self.kan(windows.reshape(-1, 12, 12)).view(-1, 4, 3, 2, 2, 3)
        return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 6, 3).abs()


class RowsOfAFlatImage(nn.Module):
    """A KAN layer over every row, or every column, of an image that comes flat."""

    def __init__(self, columns: bool) -> None:
        super().__init__()
        self.columns, self.kan = columns, Rbf(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 5, 6).transpose(1, 2) if self.columns else x.view(-1, 6, 5)
        return self.kan(rows).abs()  # type: ignore[no-any-return]


class SomeChannels(nn.Module):
    """Only some channels are read, which stand in front of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = Rbf(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(x[:, 2:6].transpose(1, 2)).abs()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (TwoLayouts, (3, 4, 5), [(6, 72)]),
        (lambda: MixerBlock(6, 10), (6, 10), [(6, 42), (10, 70), (3, 21 + 49)]),
        (Windows, (8, 6, 3), [(12, 84)]),
        (lambda: RowsOfAFlatImage(False), (30,), [(4, 35)]),
        (lambda: RowsOfAFlatImage(True), (30,), [(4, 35)]),
        (SomeChannels, (8, 5), [(6, 28)]),
    ],
)
def test_one_small_map_for_all_places(
    model: Callable[[], nn.Module], shape: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    assert weights(captured(model(), shape)) == expected


class Embedded(nn.Module):
    """Tokens, or pixels, to which a layer of the time is added."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        self.image, self.of_time = image, Rbf(4, 6)
        self.first = nn.Conv2d(9, 6, 3, padding=1) if image else Rbf(3, 6)
        self.last = Rbf(6, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        embedded = self.of_time(time)
        if self.image:
            waves = torch.cat([torch.sin(x), torch.cos(x), torch.sin(2 * x)], 1)
            hidden = self.first(waves) + embedded[:, :, None, None]
            return self.last(hidden.movedim(1, -1))  # type: ignore[no-any-return]
        return self.last(self.first(x) + embedded[:, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize("image", [False, True])
def test_a_layer_that_a_sum_repeats_stays_apart(image: bool) -> None:
    torch.manual_seed(0)
    model = Embedded(image).eval()
    inputs = {"x": draw(4, *((3, 5, 4) if image else (7, 3))), "time": draw(4, 4, seed=1)}
    program = capture(model, NamedTensors(inputs))
    assert sorted(weights(program)) == sorted([(6, 9, 3, 3) if image else (6, 21), (6, 28), (2, 42)])


@pytest.mark.parametrize("model", [TwoLayouts, lambda: MixerBlock(6, 10), Windows])
def test_reordered_axes_reach_the_file(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    made = model().eval()
    shape = {TwoLayouts: (3, 4, 5), Windows: (8, 6, 3)}.get(type(made), (6, 10))
    compiled = kancompile.compile(made, draw(200, *shape), recipe={"goal_sqnr": None})
    x = draw(20, *shape, seed=2)
    with torch.no_grad():
        expected = made(x)
    simulated = compiled.program(x)
    found = torch.as_tensor(RuntimeModel(compiled.model_bytes)(x))
    torch.testing.assert_close(found, simulated, rtol=1e-5, atol=1e-5)
    error = functional.mse_loss(simulated, expected) / expected.var()
    assert float(error) < 10**-2.5
