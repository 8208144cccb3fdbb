"""The further families of the zoo: each layer against an independent oracle, names and shapes, seeding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special
from scipy.interpolate import BSpline
from torch import Tensor, nn

from examples.zoo import bsrbf_kan, polynomial_kan, rational_kan, relu_kan, sine_kan, wav_kan

BUILDS: dict[str, Callable[..., nn.Module]] = {
    "wav_kan": wav_kan.build,
    "polynomial_kan": polynomial_kan.build,
    "relu_kan": relu_kan.build,
    "rational_kan": rational_kan.build,
    "bsrbf_kan": bsrbf_kan.build,
    "sine_kan": sine_kan.build,
}
SEED = 0


def inputs(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) * (high - low) + low).double()


def randomised(module: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that no term is missed because it is 0 or 1."""
    generator = torch.Generator().manual_seed(8)
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def values(module: nn.Module, name: str) -> np.ndarray:
    return module.state_dict()[name].numpy()


@pytest.mark.parametrize(
    ("kind", "oracle"),
    [
        ("jacobi", lambda n, u: special.eval_jacobi(n, 1.0, 1.0, u)),
        ("legendre", special.eval_legendre),
        ("hermite", special.eval_hermite),
        ("laguerre", special.eval_laguerre),
    ],
)
def test_polynomials_equal_scipy(kind: str, oracle: Callable[[int, np.ndarray], np.ndarray]) -> None:
    layer = randomised(polynomial_kan.PolynomialKANLayer(3, 2, 5, kind, torch.Generator().manual_seed(SEED)))
    x = inputs(20, 3, low=-2, high=2)
    u = np.tanh(x.numpy())
    basis = np.stack([oracle(n, u) for n in range(6)], axis=-1)
    np.testing.assert_allclose(layer.basis(x).numpy(), basis, rtol=0, atol=1e-10)
    expected = np.einsum("bik,iok->bo", basis, values(layer, f"{kind}_coeffs"))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_jacobi_with_unequal_parameters_equals_scipy() -> None:
    step = polynomial_kan.jacobi(0.5, 2.0)
    u = np.linspace(-1, 1, 41)
    found = [np.ones_like(u)]
    for n in range(5):
        slope, shift, back = step(n)
        found.append((slope * u + shift) * found[-1] - (back * found[-2] if n else 0))
    for n, polynomial in enumerate(found):
        np.testing.assert_allclose(polynomial, special.eval_jacobi(n, 0.5, 2.0, u), rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavelet", sorted(wav_kan.WAVELETS))
def test_wavelet_layer_equals_a_sum_over_edges(wavelet: str) -> None:
    layer = randomised(wav_kan.WavKANLayer(3, 4, wavelet, torch.Generator().manual_seed(SEED)))
    x = inputs(15, 3, low=-3, high=3)
    shift, scale, weight = (values(layer, name) for name in ("translation", "scale", "wavelet_weights"))
    total = np.zeros((15, 4))
    for o in range(4):
        for i in range(3):
            t = (x[:, i].numpy() - shift[o, i]) / scale[o, i]
            bell = np.exp(-t * t / 2)
            total[:, o] += (
                weight[o, i]
                * {
                    "mexican_hat": -2 / np.sqrt(3 * np.sqrt(np.pi)) * (1 - t * t) * bell,
                    "morlet": np.cos(5 * t) * bell,
                    "dog": -t * bell,
                }[wavelet]
            )
    mean, variance = values(layer, "bn.running_mean"), values(layer, "bn.running_var")
    expected = (total - mean) / np.sqrt(variance + layer.bn.eps) * values(layer, "bn.weight") + values(layer, "bn.bias")
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_relu_layer_reinterprets_the_order_of_its_bumps() -> None:
    layer = randomised(relu_kan.ReLUKANLayer(3, 4, 2, 5, torch.Generator().manual_seed(SEED)))
    x = inputs(12, 3)
    low, high = values(layer, "phase_low"), values(layer, "phase_high")
    ramps = np.clip(x.numpy()[:, :, None] - low, 0, None) * np.clip(high - x.numpy()[:, :, None], 0, None)
    bumps = (ramps * 4 * 16 / 9) ** 2  # [b, i, k]; weight number i * (g + k) + k, whatever the kernel's shape says
    weight = values(layer, "equal_size_conv.weight").reshape(5, -1)
    expected = bumps.reshape(12, -1) @ weight.T + values(layer, "equal_size_conv.bias")
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_rational_layer_equals_numpy_polynomials() -> None:
    layer = randomised(rational_kan.GRKANLayer(6, 4, 3, torch.Generator().manual_seed(SEED)))
    x = inputs(2, 5, 6, low=-4, high=4)
    above, below = values(layer, "act.weight_numerator")[0], values(layer, "act.weight_denominator")
    activated = np.empty((2, 5, 6))
    for i in range(6):
        part = x[..., i].numpy()
        bottom = 1 + np.abs(np.polynomial.polynomial.polyval(part, [0, *below[i // 2]]))
        activated[..., i] = np.polynomial.polynomial.polyval(part, above) / bottom
    expected = activated @ values(layer, "linear.weight").T + values(layer, "linear.bias")
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_mixed_layer_equals_its_formula() -> None:
    layer = randomised(bsrbf_kan.BSRBFKANLayer(3, 2, 5, 3, torch.Generator().manual_seed(SEED)))
    x = inputs(20, 3, low=-3, high=3)
    u = nn.functional.layer_norm(x, (3,), layer.layernorm.weight, layer.layernorm.bias).detach().numpy()
    knots, centers = values(layer, "grid"), values(layer, "rbf.grid")
    phi = np.exp(-(((u[..., None] - centers) / (3 / 7)) ** 2))
    for i in range(3):
        for k in range(8):
            bump = BSpline.basis_element(knots[i, k : k + 5], extrapolate=False)
            phi[:, i, k] += np.nan_to_num(bump(u[:, i]))
    silu = u / (1 + np.exp(-u))
    expected = silu @ values(layer, "base_weight").T + phi.reshape(20, -1) @ values(layer, "spline_weight").T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_sine_layer_equals_complex_waves() -> None:
    layer = randomised(sine_kan.SineKANLayer(3, 2, 4, torch.Generator().manual_seed(SEED)))
    x = inputs(10, 3, low=-4, high=4).numpy()
    phase = values(layer, "phase")[:, None] + np.arange(1, 5) / 5
    wave = np.exp(1j * (x[:, :, None] * values(layer, "freq") + phase)).imag
    expected = np.einsum("bik,oik->bo", wave, values(layer, "amplitudes")) + values(layer, "bias")
    # the steps k / (G + 1) are a float32 buffer
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_state_dicts_have_the_published_names_and_shapes() -> None:
    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    wavelets = shapes(wav_kan.build((6, 4)))
    for name in ("scale", "translation", "wavelet_weights", "weight1"):
        assert wavelets[f"layers.0.{name}"] == (4, 6)
    assert wavelets["layers.0.bn.running_var"] == (4,)
    assert shapes(polynomial_kan.build((6, 4), degree=3)) == {"layers.0.jacobi_coeffs": (6, 4, 4)}
    assert shapes(relu_kan.build((6, 4))) == {
        "layers.0.phase_low": (6, 8),
        "layers.0.phase_high": (6, 8),
        "layers.0.equal_size_conv.weight": (4, 1, 8, 6),
        "layers.0.equal_size_conv.bias": (4,),
    }
    assert shapes(rational_kan.build((8, 4), groups=4)) == {
        "layers.0.act.weight_numerator": (1, 6),
        "layers.0.act.weight_denominator": (4, 4),
        "layers.0.linear.weight": (4, 8),
        "layers.0.linear.bias": (4,),
    }
    assert shapes(bsrbf_kan.build((6, 4)))["layers.0.spline_weight"] == (4, 48)
    assert shapes(sine_kan.build((6, 4), grid_size=5))["layers.0.amplitudes"] == (4, 6, 5)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="found wavelet 'haar', expected one of"):
        wav_kan.build((3, 2), "haar")
    with pytest.raises(ValueError, match="found 'bessel', expected one of"):
        polynomial_kan.build((3, 2), "bessel")


@pytest.mark.parametrize("family", BUILDS)
def test_build_is_seeded_and_leaves_the_global_random_state_alone(family: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (BUILDS[family]((8, 8, 4), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
