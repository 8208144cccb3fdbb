"""Capture of convolutional KANs: which layers take the form of a convolution, exactly, and what the others are told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo import kagn_conv
from kancompile.ir import Contraction, show
from tests.frontend.capturing import captured, expansions, functions_are_shared
from tests.frontend.convolution_models import PowersConv, Wrapped, chebyshev, convolution, powers, seeded


def test_kagn_classifier() -> None:
    started = time.perf_counter()
    program = captured(kagn_conv.build(), (3, 16, 16), export_again=True)
    assert time.perf_counter() - started < 60
    assert [layer.name for layer in program.layers()] == [f"layers.{number}" for number in range(4)]
    assert [len(layer.expansions) for layer in program.layers()] == [1, 1, 1, 1]
    for number, (n_in, shape) in enumerate([(3, (16, 16, 16)), (16, (32, 8, 8)), (32, (64, 4, 4)), (64, (64, 4, 4))]):
        (expansion,) = expansions(program, number)
        assert (expansion.n_in, expansion.k, expansion.channels_first) == (n_in, 5, True)
        assert functions_are_shared(expansion)
        assert convolution(program, number).out_shape == shape
    assert [entry.reason for entry in program.unrecognized] == ["linear layer after a plain activation"]
    assert "aten.convolution" not in show(program)


def test_kagn_groups_are_layers_of_their_channels() -> None:
    program = captured(kagn_conv.build((4, 6, 6), (1, 2), groups=2), (4, 8, 8))
    assert [layer.name for layer in program.layers()] == ["layers.0", "layers.1", "layers.1_1"]
    assert [expansions(program, number)[0].in_shape for number in (1, 2)] == [(8, 8, 3), (8, 8, 3)]


def test_batch_norm_and_bias_are_folded() -> None:
    layers = {"norm": nn.BatchNorm2d(5), "conv": nn.Conv2d(12, 5, 3, padding=1), "base": nn.Conv2d(4, 5, 3, padding=1)}
    model = Wrapped(lambda x, norm, conv, base: norm(conv(powers(x, 3)) + base(functional.silu(x))), **layers)
    program = captured(model, (4, 6, 7))
    assert [expansion.k for expansion in expansions(program)] == [4]
    slope = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    point = torch.tensor([0.7])
    values = expansions(program)[0].sample(point)[0, 0, 0, 0]
    functions = torch.stack([*(torch.tanh(point)[0] ** power for power in (1, 2, 3)), functional.silu(point)[0]])
    order = (values[:, None] - functions).abs().argmin(1)  # number of the function of each column
    degree_major = model.conv.weight.detach().reshape(5, 3, 4, 3, 3).transpose(1, 2)
    expected = torch.cat([degree_major, model.base.weight.detach()[:, :, None]], dim=2)[:, :, order]
    found = convolution(program).weight.reshape(5, 4, 4, 3, 3)
    torch.testing.assert_close(found, expected * slope.reshape(5, 1, 1, 1, 1), rtol=1e-6, atol=0)
    bias = (model.conv.bias + model.base.bias - model.norm.running_mean) * slope + model.norm.bias
    torch.testing.assert_close(convolution(program).bias, bias.detach())
    assert len(list(program.graph_module.graph.nodes)) <= 5


@pytest.mark.parametrize(
    ("order", "moves"),
    [
        ("degree", {}),
        ("feature", {"padding": 1}),
        ("degree", {"stride": 2, "padding": 1}),
        ("feature", {"dilation": 2, "padding": 2}),
        ("degree", {"dilation": 2, "stride": 3}),
    ],
)
def test_geometry_and_order(order: str, moves: dict[str, int]) -> None:
    model = PowersConv(order=order, **moves)
    program = captured(model, (4, 9, 10), export_again=True)
    found = convolution(program)
    weight = model.conv.weight.detach()
    expected = weight.reshape(6, 3, 4, 3, 3).transpose(1, 2) if order == "degree" else weight
    assert torch.equal(found.weight, expected.reshape(6, 12, 3, 3))
    assert torch.equal(found.bias, model.conv.bias.detach())
    geometry = found.geometry
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        assert getattr(geometry, name) == (moves.get(name, default),) * 2
    assert functions_are_shared(expansions(program)[0])


@pytest.mark.parametrize(("dims", "shape"), [(1, (4, 11)), (3, (4, 3, 5, 4))])
def test_other_dimensions(dims: int, shape: tuple[int, ...]) -> None:
    program = captured(PowersConv(dims=dims, padding=1), shape)
    assert convolution(program).kernel == (3,) * dims
    assert expansions(program)[0].in_shape == (*shape[1:], 4)


def test_kernel_of_one_pixel() -> None:
    program = captured(PowersConv(kernel=1), (4, 5, 6))
    assert convolution(program).weight.shape == (6, 12, 1, 1)


def test_sides_of_a_kernel_may_differ() -> None:
    model = Wrapped(lambda x, conv: conv(powers(x, 3)), conv=nn.Conv2d(12, 5, (1, 5), padding=(0, 2), stride=(2, 1)))
    assert convolution(captured(model, (4, 6, 7))).geometry.padding == (0, 2)


def test_groups_stay_groups() -> None:
    def forward(x: Tensor, conv: nn.Module, base: nn.Module) -> Tensor:
        return conv(powers(x, 3, "feature")) + base(functional.silu(x))

    layers = {name: nn.Conv2d(n, 6, 3, padding=1, groups=2) for name, n in (("conv", 12), ("base", 4))}
    found = convolution(captured(Wrapped(forward, **layers), (4, 6, 7)))
    assert found.geometry.groups == 2
    assert found.weight.shape == (6, 8, 3, 3)


def test_groups_with_constants_and_several_anchors() -> None:
    def forward(x: Tensor, norm: nn.Module, conv: nn.Module, base: nn.Module) -> Tensor:
        u = torch.tanh(norm(x))
        basis = torch.stack([torch.ones_like(u), u, 2 * u * u - 1], dim=2).flatten(1, 2)
        return conv(basis) + base(functional.silu(x))

    layers = {name: nn.Conv2d(n, 6, 3, padding=1, groups=2) for name, n in (("conv", 12), ("base", 4))}
    program = captured(Wrapped(forward, norm=nn.InstanceNorm2d(4, affine=True), **layers), (4, 6, 7))
    assert sum(expansion.k for expansion in expansions(program)) == 4
    assert len(expansions(program)) == 2
    assert convolution(program).geometry.groups == 2


def test_groups_that_divide_degrees_become_one() -> None:
    model = PowersConv(n_out=6, groups=3)  # group g reads power g + 1 of all channels
    found = convolution(captured(model, (4, 6, 7)))
    assert found.geometry.groups == 1
    assert int(torch.count_nonzero(found.weight)) == model.conv.weight.numel()


@pytest.mark.parametrize("padding", [0, 1])
def test_constant_function(padding: int) -> None:
    model = Wrapped(lambda x, conv: conv(chebyshev(x, 3)), conv=nn.Conv2d(16, 5, 3, padding=padding))
    program = captured(model, (4, 6, 7))
    (expansion,) = expansions(program)
    assert functions_are_shared(expansion)
    assert expansion.k == 3 + padding
    names = [branch.name for branch in expansion.branches]
    assert names.count("one") == padding
    one = torch.tensor([1.0, 0.0, -1.0, 0.0])  # T_0 to T_3 at 0
    total = (model.conv.weight.detach().reshape(5, 4, 4, 3, 3) * one.reshape(4, 1, 1, 1)).sum((1, 2))
    at_zero = expansion.sample(torch.zeros(1))[0, 0, 0]  # [n_in, k]
    weight = convolution(program).weight.reshape(5, 4, -1, 3, 3)
    found = (weight * at_zero.reshape(4, -1, 1, 1)).sum((1, 2))
    if padding:
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-6)
    else:
        everywhere = found.sum((1, 2)) + convolution(program).bias - model.conv.bias.detach()
        torch.testing.assert_close(everywhere, total.sum((1, 2)), rtol=1e-5, atol=1e-6)


def test_constant_that_only_evaluation_shows() -> None:
    def forward(x: Tensor, conv: nn.Module) -> Tensor:
        angle = torch.acos(torch.tanh(x).clamp(-0.999, 0.999)).unsqueeze(2)
        degrees = torch.arange(4.0).reshape(1, 1, 4, 1, 1)
        return conv(torch.cos(angle * degrees).flatten(1, 2))

    model = Wrapped(forward, conv=nn.Conv2d(16, 5, 3, padding=1))
    program = captured(model, (4, 6, 7))
    (expansion,) = expansions(program)
    assert expansion.k == 4
    weight = convolution(program).weight.reshape(5, 4, 4, 3, 3)
    assert torch.equal(weight[:, :, -1], model.conv.weight.detach().reshape(5, 4, 4, 3, 3)[:, :, 0])


def test_affine_map_of_the_basis_is_folded() -> None:
    def forward(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        return conv(norm(powers(x, 3)))

    program = captured(Wrapped(forward, norm=nn.BatchNorm2d(12), conv=nn.Conv2d(12, 5, 3, padding=1)), (4, 6, 7))
    (expansion,) = expansions(program)
    assert expansion.k == 4  # the shifts of the batch norm are constants
    assert functions_are_shared(expansion)


def test_functions_of_each_channel() -> None:
    def forward(x: Tensor, norm: nn.Module, conv: nn.Module, base: nn.Module) -> Tensor:
        return conv(powers(norm(x), 3)) + base(x)

    layers = {"conv": nn.Conv2d(12, 5, 3, padding=1), "base": nn.Conv2d(4, 5, 3, padding=1)}
    program = captured(Wrapped(forward, norm=nn.BatchNorm2d(4), **layers), (4, 6, 7))
    (expansion,) = expansions(program)
    assert expansion.k == 4
    assert not functions_are_shared(expansion)


def test_normalisation_in_front_is_an_anchor() -> None:
    model = Wrapped(
        lambda x, norm, conv: conv(powers(norm(x), 3)), norm=nn.InstanceNorm2d(4), conv=nn.Conv2d(12, 5, 3, padding=1)
    )
    program = captured(model, (4, 6, 7))
    assert len(expansions(program)) == 1
    assert "normalization over several features" in {entry.reason for entry in program.unrecognized}


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
def test_pooling_between_layers_stays(pool: nn.Module) -> None:
    layers = {"first": PowersConv(3, 4, padding=1), "pool": pool, "second": PowersConv(4, 5, padding=1)}
    program = captured(Wrapped(lambda x, first, pool, second: second(pool(first(x))), **layers), (3, 6, 8))
    assert [layer.name for layer in program.layers()] == ["first", "second"]
    assert "pool" in show(program)


@pytest.mark.parametrize("head", [nn.Linear(4 * 6 * 5, 3), PowersConv(4, 3, kernel=1)])
def test_head_behind_flattened_convolution(head: nn.Module) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = PowersConv(3, 4, padding=1), seeded(head)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head(y.flatten(1) if isinstance(self.head, nn.Linear) else y)

    program = captured(Network(), (3, 6, 5))
    assert isinstance(convolution(program), Contraction)


def test_kan_behind_flattened_convolution() -> None:
    from tests.frontend.odd_models import DegreeMajor

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.kan = PowersConv(3, 4, padding=1, stride=2), DegreeMajor(4 * 3 * 3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.kan(self.conv(x).flatten(1))

    program = captured(Network(), (3, 6, 5))
    assert [layer.name for layer in program.layers()] == ["conv", "kan"]
    assert isinstance(convolution(program), Contraction)


def test_mean_without_a_function_between() -> None:
    model = Wrapped(
        lambda x, conv, linear: linear(conv(x).mean((2, 3))), conv=PowersConv(3, 4, padding=1), linear=nn.Linear(4, 3)
    )
    program = captured(model, (3, 6, 5))
    assert [layer.name for layer in program.layers()] == ["conv"]
    assert "plain linear layer" in {entry.reason for entry in program.unrecognized}


def test_residual_stays() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (PowersConv(4, 4, padding=1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(x)

    program = captured(Block(), (4, 6, 5))
    assert [layer.name for layer in program.layers()] == ["first", "second"]
    assert [entry.reason for entry in program.unrecognized] == ["skip connection", "skip connection"]


def test_kernel_of_one_pixel_behind_is_folded() -> None:
    model = Wrapped(
        lambda x, depth, point: point(depth(powers(x, 3, "feature"))),
        depth=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        point=nn.Conv2d(12, 5, 1),
    )
    found = convolution(captured(model, (4, 6, 5)))
    assert found.weight.shape == (5, 12, 3, 3)


def test_part_of_the_channels() -> None:
    model = Wrapped(
        lambda x, conv: torch.cat([conv(powers(x[:, 1:3], 3)), x], dim=1), conv=nn.Conv2d(6, 5, 3, padding=1)
    )
    program = captured(model, (4, 6, 5), export_again=True)
    assert expansions(program)[0].in_shape == (6, 5, 2)


def test_scattered_channels() -> None:
    model = Wrapped(lambda x, conv: conv(powers(x[:, [3, 0]], 3)), conv=nn.Conv2d(6, 5, 3, padding=1))
    program = captured(model, (4, 6, 5), export_again=True)
    assert expansions(program)[0].in_shape == (6, 5, 2)


def test_input_that_is_no_image() -> None:
    model = Wrapped(lambda x, conv: conv(powers(x.view(-1, 2, 6, 5), 3)), conv=nn.Conv2d(6, 5, 3, padding=1))
    program = captured(model, (60,), export_again=True)
    assert expansions(program)[0].in_shape == (6, 5, 2)


def test_channels_last() -> None:
    def forward(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        return conv(powers(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 3))

    program = captured(Wrapped(forward, norm=nn.LayerNorm(4), conv=nn.Conv2d(12, 5, 3, padding=1)), (4, 6, 5))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.channels_first) == ((6, 5, 4), False)


@pytest.mark.parametrize("stride", [1, 2])
def test_smaller_kernels_become_taps_of_a_larger_one(stride: int) -> None:
    def forward(x: Tensor, conv: nn.Module, short: nn.Module, wide: nn.Module) -> Tensor:
        u = functional.silu(x)
        return conv(chebyshev(x, 2)) + short(u) + wide(u)

    layers = {
        "conv": nn.Conv2d(12, 5, 3, padding=1, stride=stride),
        "short": nn.Conv2d(4, 5, 1, stride=stride),
        "wide": nn.Conv2d(4, 5, (5, 1), padding=(2, 0), stride=stride),
        "last": nn.Conv2d(5, 5, 1),
    }
    program = captured(Wrapped(lambda x, conv, short, wide, last: forward(x, conv, short, wide), **layers), (4, 6, 7))
    assert "join of different convolutions" in {entry.reason for entry in program.unrecognized}
    del layers["wide"]
    model = Wrapped(lambda x, conv, short, last: last(forward(x, conv, short, lambda u: 0)), **layers)
    found = convolution(captured(model, (4, 6, 7)))
    assert found.kernel == (3, 3)
    assert found.geometry.padding == (1, 1)


@pytest.mark.parametrize("join", [torch.add, lambda a, b: torch.cat([a, b], dim=1)])
def test_convolutions_that_move_differently_are_layers_of_their_own(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    layers = {"left": PowersConv(4, 5, padding=1), "right": PowersConv(4, 5, padding=2, dilation=2)}
    program = captured(Wrapped(lambda x, left, right: torch.sigmoid(join(left(x), right(x))), **layers), (4, 6, 7))
    assert [layer.name for layer in program.layers()] == ["left", "right"]
    assert [entry.reason for entry in program.unrecognized] == ["join of different convolutions"]


def test_concatenation_of_convolutions_of_all_channels_is_one() -> None:
    layers = {"left": PowersConv(4, 5, padding=1), "right": PowersConv(4, 3, padding=1)}
    program = captured(
        Wrapped(lambda x, left, right: torch.sigmoid(torch.cat([left(x), right(x)], dim=1)), **layers), (4, 6, 7)
    )
    assert convolution(program).out_shape == (8, 6, 7)


def test_padding_behind_the_basis_is_that_of_the_convolution() -> None:
    model = Wrapped(
        lambda x, conv: conv(functional.pad(functional.pad(chebyshev(x, 2), (1, 1, 2, 2)), (0, 0, 1, 1))),
        conv=nn.Conv2d(12, 5, 3, padding=(0, 1)),
    )
    assert convolution(captured(model, (4, 6, 7))).geometry.padding == (3, 2)


class RandomLayers(nn.Module):
    """Two layers with a basis, order, geometry and normalisation drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def pick(*options: int) -> int:
            return options[int(torch.randint(len(options), (1,), generator=generator))]

        self.basis = [(pick(1, 2, 3), pick(0, 1), pick(0, 1)) for _ in range(2)]
        self.layers = nn.ModuleList()
        n_in = 4
        for degree, constant, feature_major in self.basis:
            n_out, groups = pick(4, 6), pick(1, 2) if feature_major else 1
            moves = {"stride": pick(1, 2), "padding": pick(0, 1, 2), "dilation": pick(1, 2), "groups": groups}
            layer = nn.ModuleDict(
                {
                    "poly": nn.Conv2d(n_in * (degree + constant), n_out, 3, bias=bool(pick(0, 1)), **moves),
                    "base": nn.Conv2d(n_in, n_out, 3, bias=False, **moves),
                    "before": nn.BatchNorm2d(n_in) if pick(0, 1) else nn.Identity(),
                    "behind": nn.BatchNorm2d(n_out) if pick(0, 1) else nn.Identity(),
                }
            )
            self.layers.append(seeded(layer, seed))
            n_in = n_out

    def forward(self, x: Tensor) -> Tensor:
        for layer, (degree, constant, feature_major) in zip(self.layers, self.basis, strict=True):
            u = torch.tanh(layer["before"](x))
            basis = [u ** (power + 1 - constant) for power in range(degree + constant)]
            joined = torch.stack(basis, dim=2).flatten(1, 2) if feature_major else torch.cat(basis, dim=1)
            x = layer["behind"](layer["poly"](joined) + layer["base"](functional.silu(x)))
        return x


@pytest.mark.parametrize("seed", range(6))
def test_random_layers(seed: int) -> None:
    model = RandomLayers(seed)
    program = captured(model, (4, 16, 15))
    assert len(program.layers()) == 2
    assert "aten.convolution" not in show(program)
    for number, layer in enumerate(model.layers):
        assert convolution(program, number).geometry.groups == layer["poly"].groups
