"""Networks that were trained with ``torch.ao``'s fake quantizers are captured as what these compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization

from examples.zoo import efficient_kan
from kancompile import KanCompileError
from kancompile.frontend import capture
from kancompile.frontend.trace.fake_quantizers import fake_quantize, fake_quantize_channels

QUANTIZERS = {
    "fused": lambda: quantization.FusedMovingAvgObsFakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 63),
    "channels": lambda: quantization.FakeQuantize(
        quantization.PerChannelMinMaxObserver,
        quant_min=-32,
        quant_max=31,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
    ),
}


def inputs(n: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def network(kind: str) -> nn.Module:
    kan = efficient_kan.KAN([4, 3, 2], generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(QUANTIZERS[kind](), kan.layers[0], QUANTIZERS[kind](), kan.layers[1])
    model(inputs())
    return model.eval()


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-4, 1e4), st.integers(-100, 100), st.integers(1, 8))
def test_the_form_is_that_of_the_kernels(scale: float, zero_point: int, bits: int) -> None:
    x = 3 * (1 << bits) * scale * inputs()
    most = (1 << bits) - 1
    zero_point = min(max(zero_point, 0), most)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, 0, most), expected, rtol=1e-6, atol=0)
    scales, zeros = scale * torch.arange(1.0, 5), torch.full((4,), zero_point, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scales, zeros, 1, 0, most)
    torch.testing.assert_close(fake_quantize_channels(x, scales, zeros, 1, 0, most), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_trained_quantizers_are_captured(kind: str) -> None:
    model = network(kind)
    model.apply(quantization.disable_observer)
    program = capture(model, inputs())
    assert len(program.layers()) == 2
    fresh = inputs(500, seed=2)
    torch.testing.assert_close(program(fresh), model(fresh), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_observer_that_is_on_is_refused() -> None:
    with pytest.raises(KanCompileError, match=r"'0': found an observer that is on.*disable_observer"):
        capture(network("fused"), inputs())
