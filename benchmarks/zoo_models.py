"""The models of examples/zoo, one or several of each family, and variants that take another path through the compiler."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.digit_models import FamilyModel, load
from examples.zoo import (
    bsrbf_kan,
    chebyshev_kan,
    efficient_kan,
    fast_kan,
    faster_kan,
    fourier_kan,
    gram_kan,
    kagn_conv,
    polynomial_kan,
    rational_kan,
    relu_kan,
    sine_kan,
    wav_kan,
)

WIDTHS = (64, 32, 10)


def _zoo(family: str, name: str, build: Callable[[], nn.Module], limits: str = "") -> FamilyModel:
    return FamilyModel(family, f"zoo {name}", build, limits=limits)


def _adapted_grid() -> nn.Module:
    model = efficient_kan.build(WIDTHS)
    model(load((64,)).x_train[:600], update_grid=True)
    return model


ZOO = (
    _zoo("B-spline, order 3", "efficient_kan", lambda: efficient_kan.build(WIDTHS)),
    _zoo("B-spline, order 1", "efficient_kan", lambda: efficient_kan.build(WIDTHS, spline_order=1)),
    _zoo("B-spline, order 5", "efficient_kan", lambda: efficient_kan.build(WIDTHS, spline_order=5)),
    _zoo("B-spline, grid 40", "efficient_kan", lambda: efficient_kan.build(WIDTHS, grid_size=40)),
    _zoo("B-spline, adapted grids", "efficient_kan", _adapted_grid),
    _zoo("radial basis", "fast_kan", lambda: fast_kan.build(WIDTHS)),
    _zoo("reflectional switch", "faster_kan", lambda: faster_kan.build(WIDTHS)),
    _zoo("B-spline + radial basis", "bsrbf_kan", lambda: bsrbf_kan.build(WIDTHS)),
    _zoo("Chebyshev", "chebyshev_kan", lambda: chebyshev_kan.build(WIDTHS)),
    _zoo("Gram", "gram_kan", lambda: gram_kan.build(WIDTHS)),
    _zoo("Jacobi", "polynomial_kan", lambda: polynomial_kan.build(WIDTHS, "jacobi")),
    _zoo("Legendre", "polynomial_kan", lambda: polynomial_kan.build(WIDTHS, "legendre")),
    _zoo("Hermite", "polynomial_kan", lambda: polynomial_kan.build(WIDTHS, "hermite")),
    _zoo("Laguerre", "polynomial_kan", lambda: polynomial_kan.build(WIDTHS, "laguerre")),
    _zoo("Fourier", "fourier_kan", lambda: fourier_kan.build(WIDTHS)),
    _zoo("Fourier, normalized", "fourier_kan", lambda: fourier_kan.build(WIDTHS, normalise=True)),
    _zoo("sine, phase of each input", "sine_kan", lambda: sine_kan.build(WIDTHS)),
    _zoo("ReLU bumps of each input", "relu_kan", lambda: relu_kan.build(WIDTHS)),
    _zoo("rational of each group", "rational_kan", lambda: rational_kan.build(WIDTHS)),
    _zoo("wavelet of each edge, Mexican hat", "wav_kan", lambda: wav_kan.build(WIDTHS, "mexican_hat")),
    _zoo("wavelet of each edge, Morlet", "wav_kan", lambda: wav_kan.build(WIDTHS, "morlet", initial_scale=4.0)),
    _zoo("wavelet of each edge, Gaussian derivative", "wav_kan", lambda: wav_kan.build(WIDTHS, "dog")),
    FamilyModel(
        "Gram convolution",
        "zoo kagn_conv",
        lambda: kagn_conv.build((1, 8, 16), (1, 2)),
        (1, 8, 8),
    ),
)
