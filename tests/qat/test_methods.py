"""Every method against its formula: values by definition, gradients by finite differences with the rounding held."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kancompile.ir import IndexQuantizer
from kancompile.qat.methods import INDEX_METHODS, WEIGHT_METHODS

Array = NDArray[np.float64]
LOW, HIGH = -4, 3
N_OUT, COLUMNS = 3, 11
INDEX = IndexQuantizer(0.3, 2, 6)
FEATURES = 7
ALPHA = 0.4
K = math.log(2 / ALPHA - 1)


def soft(t: Array) -> Array:
    cell = np.floor(t)
    return cell + 0.5 + 0.5 * np.tanh(K * (t - cell - 0.5)) / np.tanh(K / 2)


def with_held_rounding(
    position: Callable[..., Array], where: tuple[Array, ...], slope_of: Callable[[Array], Array] = lambda t: t
) -> Callable[..., Array]:
    """What has the slope of ``slope_of`` and at ``where`` the value of rounding."""
    residual = np.round(position(*where)) - slope_of(position(*where))
    return lambda *values: slope_of(position(*values)) + residual


def difference(function: Callable[..., float], values: list[Array], which: int) -> Array:
    found = np.zeros_like(values[which])
    for place in np.ndindex(found.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = [value.copy() for value in values]
            moved[which][place] += step
            sides.append(function(*moved))
        found[place] = (sides[0] - sides[1]) / 2e-6
    return found


def latent() -> tuple[torch.Tensor, torch.Tensor, Array]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(LOW, HIGH + 1, (N_OUT, COLUMNS), generator=generator).float()
    codes[0, 0], codes[0, 1] = LOW, HIGH
    moved = torch.rand(N_OUT, COLUMNS, generator=generator) * 1.9 - 0.95
    return codes, moved, np.random.default_rng(0).normal(size=(N_OUT, COLUMNS))


def clip(t: Array) -> Array:
    return np.clip(t, LOW, HIGH)


def tangent(w: Array, q: float) -> Array:
    t = np.tanh(w / q)
    return clip(q * t / np.abs(t).max())


def interval(w: Array, c: Array, d: Array) -> Array:
    size = np.clip(np.abs(w) / d + 0.5 * 4 * (1 - c / d), 0, 4)
    return clip(np.where(w >= 0, 1.0, -1.0) * size)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_weights_learn_by_the_formula(method: str) -> None:
    codes, moved, cotangent = latent()
    live = torch.ones(COLUMNS, dtype=torch.bool)
    quantizer = WEIGHT_METHODS[method](codes, LOW, HIGH, torch.tensor([COLUMNS]), live)
    start, factor = quantizer()
    assert torch.equal(start, codes)
    assert torch.equal(factor, torch.ones(1, N_OUT))

    with torch.no_grad():
        quantizer.weight += moved
        quantizer.step += torch.tensor([[0.1, -0.2, 0.03]])
    parameters = dict(quantizer.named_parameters())
    names = list(parameters)
    values = [parameter.detach().double().numpy() for parameter in parameters.values()]
    found, factor = quantizer()
    assert torch.equal(found, found.round())
    assert float(found.detach().min()) >= LOW
    assert float(found.detach().max()) <= HIGH

    scale = 1.0
    if method in ("lsq", "lsq+", "dsq"):
        scale = 1 / math.sqrt(COLUMNS * HIGH)

        def position(w: Array, s: Array) -> Array:
            return clip(w / s.T)
    elif method == "dorefa":

        def position(w: Array, s: Array) -> Array:
            return tangent(w, 4.0)
    else:

        def position(w: Array, s: Array, c: Array, d: Array) -> Array:  # type: ignore[misc]
            return interval(w, c, d)

    hard = np.round(position(*values))
    held = with_held_rounding(position, tuple(values), soft if method == "dsq" else np.asarray)

    def loss(*v: Array) -> float:
        return float((held(*v) * v[1].T * cotangent).sum())

    np.testing.assert_array_equal(found.detach().numpy(), hard)
    (found * factor.T * torch.from_numpy(cotangent)).sum().backward()
    for number, name in enumerate(names):
        expected = difference(loss, values, number)
        if name == "step":
            expected = expected * scale
        if name in ("center", "distance"):
            expected = expected / math.sqrt(N_OUT * COLUMNS * HIGH)
        gradient = parameters[name].grad
        assert gradient is not None, name
        np.testing.assert_allclose(gradient.double().numpy(), expected, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("method", INDEX_METHODS)
def test_indices_learn_by_the_formula(method: str) -> None:
    most, zero, scale = INDEX.levels - 1, INDEX.zero_point, INDEX.scale
    index = INDEX_METHODS[method](INDEX, FEATURES)
    assert index.quantizer() == INDEX
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(40, generator=generator) * 3 - 1.2).double().float().requires_grad_()
    np.testing.assert_array_equal(index.rows(x.detach()).numpy(), INDEX(x.detach()).numpy())
    with torch.no_grad():
        for name, parameter in index.named_parameters():
            parameter += 0.07 if name != "shift" else 0.2
    assert torch.equal(index.rows(x.detach()).to(torch.uint8), index.quantizer()(x.detach()))
    real_values = index.quantizer().real(index.quantizer()(x.detach()))
    np.testing.assert_array_equal(index(x.detach()).detach().numpy(), real_values.numpy())

    parameters = dict(index.named_parameters())
    values = [x.detach().double().numpy(), *(value.detach().double().numpy() for value in parameters.values())]
    cotangent = np.random.default_rng(0).normal(size=40)
    residual = np.zeros(40)
    if method in ("lsq", "lsq+"):
        low = -np.round(zero + values[2]) if method == "lsq+" else -float(zero)
        clipped = np.clip(values[0] / (scale * values[1]), low, most + low)
        residual = np.round(clipped) - clipped
    if method == "dsq":
        clipped = np.clip(values[0] / (scale * values[1]), -zero, most - zero)
        residual = np.round(clipped) - soft(clipped)
    off = 0.0 if method != "lsq+" else np.round(zero + values[2]) - (zero + values[2])

    def interval(d: Array, m: Array) -> tuple[Array, Array]:
        center, half = most / 2 - zero + m, most / 2 * d
        return 0.5 / (half * scale), 0.5 - 0.5 * center / half

    if method == "qil":
        a, e = interval(values[1], values[2])
        transformed = np.clip(a * values[0] + e, 0, 1) * most
        residual = np.round(transformed) - transformed

    def real(x: Array, *v: Array) -> Array:
        if method == "lsq":
            return scale * v[0] * (np.clip(x / (scale * v[0]), -zero, most - zero) + residual)
        if method == "lsq+":
            z = zero + v[1] + off
            return scale * v[0] * (np.clip(x / (scale * v[0]), -z, most - z) + residual)
        if method == "qil":
            a, e = interval(*v)
            return ((np.clip(a * x + e, 0, 1) * most + residual) / most - e) / a
        if method == "dsq":
            return scale * v[0] * (soft(np.clip(x / (scale * v[0]), -zero, most - zero)) + residual)
        r = v[0] if v else 1.0
        return np.clip(x, -zero * scale * r, (most - zero) * scale * r)

    (index(x) * torch.from_numpy(cotangent).float()).sum().backward()

    def loss(*v: Array) -> float:
        return float((real(*v) * cotangent).sum())

    assert x.grad is not None
    np.testing.assert_allclose(x.grad.double().numpy(), difference(loss, values, 0), rtol=1e-3, atol=1e-5)
    for number, (name, parameter) in enumerate(parameters.items(), start=1):
        expected = difference(loss, values, number) / math.sqrt(FEATURES * most)
        assert parameter.grad is not None, name
        np.testing.assert_allclose(parameter.grad.double().numpy(), expected, rtol=1e-3, atol=1e-4, err_msg=name)
