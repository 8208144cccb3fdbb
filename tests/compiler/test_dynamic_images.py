"""Images of dynamic height and width: one file for images of every size."""

from __future__ import annotations

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from kancompile import Recipe
from kancompile.frontend import capture
from kancompile.ir import Contraction, Program
from tests.frontend.convolution_models import PowersConv, Wrapped, seeded
from tests.interfaces import Rbf

IMAGES = np.random.default_rng(0).standard_normal((48, 3, 12, 10)).astype(np.float32)
DYNAMIC = "batch, 3, height, width"
OPEN = {"input": {2: "height", 3: "width"}}
SIZES = ((16, 22), (8, 6))


class UnfoldConv(nn.Module):
    """Cuts images into patches, functions of every place of a patch, a sum over them."""

    def __init__(self, n_in: int, n_out: int, padding: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        self.weight = nn.Parameter(torch.zeros(n_out, 9 * n_in, 4))
        self.register_buffer("center", torch.linspace(-1.5, 1.5, 4))
        center = self.center.clone()
        seeded(self)
        self.center.copy_(center)

    def forward(self, x: Tensor) -> Tensor:
        sides = [(size + 2 * self.padding - 3) // self.stride + 1 for size in x.shape[2:]]
        patches = functional.unfold(x, 3, padding=self.padding, stride=self.stride)
        phi = torch.exp(-((patches.unsqueeze(-1) - self.center) ** 2))
        return torch.einsum("bclk,ock->bol", phi, self.weight).reshape(len(x), len(self.weight), *sides)


class Pyramid(nn.Module):
    """Halves an image, enlarges it again, and joins both."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low, self.up = (
            PowersConv(3, 6, padding=1),
            PowersConv(6, 6, padding=1),
            PowersConv(12, 2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = functional.interpolate(self.low(functional.max_pool2d(high, 2)), scale_factor=2.0, mode="nearest")
        return self.up(torch.cat([high, low], 1))


def plain_first() -> nn.Module:
    """Ordinary convolutions, a KAN one, a mean over pixels and a layer of samples."""
    norm = nn.BatchNorm2d(6)
    convolutions = [nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1)]
    return seeded(
        nn.Sequential(*convolutions, PowersConv(4, 4, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Rbf(4, 3))
    ).eval()


def layers_of(program: Program) -> list[tuple[int, ...]]:
    found = [program.contraction(layer) for layer in program.layers()]
    return [one.kernel for one in found if isinstance(one, Contraction)]


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        (PowersConv(3, 6, order="feature", padding=2, dilation=2, groups=3), [(3, 3)]),
        (
            Wrapped(lambda x, a, b: b(functional.avg_pool2d(a(x), 2)), a=PowersConv(3, 4), b=PowersConv(4, 2, 2)),
            [(3, 3), (2, 2)],
        ),
        (Wrapped(lambda x, a: a(torch.cat([x.sin(), torch.ones_like(x[:, :1])], 1)), a=nn.Conv2d(4, 4, 3)), [(3, 3)]),
        (Wrapped(lambda x, a: a(x[:, [0, 2]]), a=PowersConv(2, 4)), [(3, 3)]),
        (UnfoldConv(3, 4, padding=0, stride=2), [(3, 3)]),
    ],
)
def test_layers_are_found_and_hold_at_every_size(model: nn.Module, kernels: list[tuple[int, ...]]) -> None:
    program = capture(model.eval(), torch.from_numpy(IMAGES[:8]), dynamic=OPEN)
    assert layers_of(program) == kernels
    for size in ((16, 22), (13, 15)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
        assert torch.allclose(program(x), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("model", [Pyramid(), nn.Sequential(UnfoldConv(3, 4), UnfoldConv(4, 3, 0)), plain_first()])
@pytest.mark.slow
def test_one_file_for_every_size(model: nn.Module) -> None:
    compiled = kancompile.compile(model.eval(), IMAGES, recipe=Recipe(goal_sqnr=None), dynamic=DYNAMIC)
    assert not any(compiled.program.is_float(layer) for layer in compiled.program.layers())
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for size in SIZES:
        x = torch.randn(3, 3, *size)
        found = session.run(None, {"input": x.numpy()})[0]
        assert np.array_equal(found, compiled.program(x).numpy())
        with torch.no_grad():
            expected = model(x)
        noise = (torch.from_numpy(found) - expected).square().mean()
        assert float(expected.var() / noise) > 30


@pytest.mark.slow
def test_float_layers_take_every_size() -> None:
    model = PowersConv(3, 5, padding=1).eval()
    for precision in ("float", "int16"):
        compiled = kancompile.compile(model, IMAGES, recipe=Recipe(precision=precision), dynamic=DYNAMIC)
        session = onnxruntime.InferenceSession(compiled.model_bytes)
        x = torch.randn(3, 3, 8, 20)
        with torch.no_grad():
            assert np.allclose(session.run(None, {"input": x.numpy()})[0], model(x).numpy(), atol=1e-3)


def test_one_dynamic_side_and_signals() -> None:
    for model, x, open_sizes in (
        (PowersConv(3, 5, padding=1), torch.from_numpy(IMAGES[:8]), {3: "width"}),
        (PowersConv(3, 5, padding=1, dims=1), torch.from_numpy(IMAGES[:8, :, 0]), {2: "time"}),
    ):
        program = capture(model.eval(), x, dynamic={"input": open_sizes})
        longer = torch.cat([x, x], -1)
        with torch.no_grad():
            assert torch.allclose(program(longer), model(longer), atol=1e-5)


class OfPixels(nn.Module):
    """Functions that differ between pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.sin(x * torch.arange(x.shape[3])))


def test_functions_of_pixels_stay_as_they_are() -> None:
    model = nn.Sequential(OfPixels(), PowersConv(4, 2)).eval()
    program = capture(model, torch.from_numpy(IMAGES[:8]), dynamic=OPEN)
    assert [layer.name for layer in program.layers()] == ["1"]
    assert [entry.reason for entry in program.unrecognized] == ["samples of the batch are not treated alike"]


@pytest.mark.parametrize("target", ["c99", "litert"])
def test_targets_of_fixed_sizes_refuse(target: str) -> None:
    with pytest.raises(kancompile.KanCompileError, match=r"found the inputs input \[batch, 3, height, width\]"):
        kancompile.compile(PowersConv(3, 5).eval(), IMAGES, dynamic=DYNAMIC, target=target)
