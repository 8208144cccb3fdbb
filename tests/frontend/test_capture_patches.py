"""Networks that cut images into patches before their functions: captured as convolutions of functions of pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kancompile
from benchmarks.client_models import import_client
from kancompile.frontend.capture import capture
from kancompile.ir import Contraction, Program


class PatchKAN(nn.Module):
    """Hat functions of the values of patches, summed with weights of each group.

    ``shift`` moves the functions of every place of a patch by another amount.
    """

    def __init__(self, n_in: int, n_out: int, groups: int = 1, shift: float = 0.0, **moves: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.moves = {"kernel_size": (3, 2), "stride": 1, "padding": 0, "dilation": 1} | moves
        self.groups, self.n_out = groups, n_out
        rows = n_in // groups * 6
        self.weight = nn.Parameter(torch.randn(groups, rows * 4, n_out // groups, generator=generator) / rows)
        self.centers = nn.Parameter(torch.linspace(-1, 1, 4) + shift * torch.rand(rows, 1, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, **self.moves)
        values = patches.transpose(1, 2).reshape(-1, self.groups, patches.shape[1] // self.groups).transpose(0, 1)
        hats = nn.functional.relu(1.2 - (values.unsqueeze(-1) - self.centers).abs())
        sums = torch.bmm(hats.flatten(2), self.weight).transpose(0, 1)
        stride, padding, dilation = (self.moves[key] for key in ("stride", "padding", "dilation"))
        height = (x.shape[2] + 2 * padding - 2 * dilation - 1) // stride + 1
        image = sums.reshape(len(x), -1, self.n_out).transpose(1, 2)
        return image.reshape(len(x), self.n_out, height, -1)


def images(n: int, channels: int, size: float = 2.0) -> Tensor:
    return (torch.rand(n, channels, 7, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1) * size


def assert_equal(program: Program, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("groups", "moves"),
    [(1, {}), (1, {"padding": 1}), (2, {"padding": 1, "stride": 2}), (4, {"dilation": 2, "padding": 2})],
)
def test_patches_become_a_convolution(groups: int, moves: dict[str, int]) -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_mean = torch.linspace(-0.2, 0.3, 8)
    norm.running_var = torch.linspace(0.5, 2, 8)
    model = nn.Sequential(PatchKAN(4, 8, groups, **moves), norm).eval()
    program = capture(model, (4, 7, 8))
    (layer,) = program.layers()
    found = program.module(layer.contraction)
    assert isinstance(found, Contraction)
    assert found.kernel == (3, 2)
    assert found.geometry.groups == groups
    # 4 functions, and the number 1 where padding holds functions of 0
    assert found.weight.shape[1] == 4 // groups * (5 if "padding" in moves else 4)
    assert_equal(program, model, images(5, 4))


def test_functions_that_differ_within_a_patch_are_no_convolution() -> None:
    model = PatchKAN(1, 2, shift=0.5).eval()
    program = capture(model, (1, 7, 8))
    (layer,) = program.layers()
    assert isinstance(program.module(layer.contraction), Contraction)  # of the whole image
    assert_equal(program, model, images(5, 1))


def test_the_patches_of_a_padded_image_keep_their_border_in_8_bits() -> None:
    """Functions of the padding are far from 0 here, so that a border of zeros would show."""
    model = nn.Sequential(PatchKAN(2, 4, 2, padding=1), nn.BatchNorm2d(4), PatchKAN(4, 3, 1, padding=1)).eval()
    compiled = kancompile.compile(model, images(64, 2))
    x = images(40, 2)
    result = kancompile.validate(
        compiled.model_bytes, model, x, program=compiled.program, float_program=compiled.captured
    )
    assert result.compiled.sqnr_db > 33
    assert min(error.own_sqnr_db or 0.0 for error in result.layers) > 33


@pytest.mark.needs("convkan")
def test_convkan_with_groups() -> None:
    package = import_client("convkan")
    torch.manual_seed(0)
    model = package.ConvKAN(4, 6, kernel_size=3, padding=1, groups=2).eval()
    program = capture(model, (4, 7, 8))
    found = program.module(program.layers()[0].contraction)
    assert isinstance(found, Contraction)
    assert found.geometry.groups == 2
    assert_equal(program, model, images(3, 4, size=1.5))
