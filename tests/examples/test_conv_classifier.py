"""The convolutional example, from training to a validated file, and the B-spline convolutions against scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch.nn import functional

from examples import conv_classifier
from examples.zoo import spline_conv
from kancompile.frontend import capture


@pytest.mark.slow
def test_example_trains_compiles_and_validates(tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    result = conv_classifier.main(["--epochs", "3", "--out", str(path)])
    assert path.is_file()
    assert path.with_name("conv.manifest.json").is_file()
    assert result.passed
    assert result.n_samples == conv_classifier.N_TEST
    assert result.metrics["float"]["accuracy"] > 80
    assert abs(result.metrics["compiled"]["accuracy"] - result.metrics["float"]["accuracy"]) < 1.5
    assert result.compiled.sqnr_db > 28
    assert all(layer.sqnr_db > 25 for layer in result.layers)


def test_spline_convolution_is_scipys_splines_convolved() -> None:
    layer = spline_conv.SplineConv2d(2, 3, 3, torch.Generator().manual_seed(0), padding=1).eval()
    x = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(1)) * 1.9 - 0.95
    knots = layer.knots.double().numpy()
    basis = np.stack([BSpline(knots, np.eye(8)[k], 3)(x.double().numpy()) for k in range(8)], axis=2)
    splines = functional.conv2d(torch.from_numpy(basis).flatten(1, 2), layer.spline.weight.double(), padding=1)
    base = functional.conv2d(functional.silu(x).double(), layer.base.weight.double(), padding=1)
    expected = (splines + base) / np.sqrt(1 + layer.norm.eps)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_spline_classifier_is_captured_whole() -> None:
    model = spline_conv.build((3, 4, 5), (1, 2), 4).eval()
    program = capture(model, (3, 8, 8))
    assert [layer.name for layer in program.layers()] == ["layers.0", "layers.1"]
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
