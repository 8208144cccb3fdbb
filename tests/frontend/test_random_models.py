"""Random KAN layers: any basis, any order of dimensions, any way to write the contraction."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.frontend.capturing import captured, contraction, draw, expansions


def splines(x: Tensor, c: Tensor, order: int) -> Tensor:
    """B-splines on knots that are the centers and more beside them; the first functions of each input."""
    k = c.shape[-1]
    beside = torch.arange(1, order + 2) * 0.6
    knots = torch.cat([c.sort(-1).values, c.amax(-1, keepdim=True) + beside], dim=-1)
    values = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).to(x.dtype)
    for p in range(1, order + 1):
        left = (x - knots[..., : -p - 1]) / (knots[..., p:-1] - knots[..., : -p - 1])
        right = (knots[..., p + 1 :] - x) / (knots[..., p + 1 :] - knots[..., 1:-p])
        values = left * values[..., :-1] + right * values[..., 1:]
    return values[..., :k]


def recurrence(x: Tensor, c: Tensor, step: Callable[[int], tuple[float, float]]) -> Tensor:
    """Polynomials of tanh(x) by three terms, stacked behind."""
    u = torch.tanh(x[..., 0])
    values = [torch.ones_like(u), u]
    for n in range(1, c.shape[-1]):
        slope, back = step(n)
        values.append(slope * u * values[-1] - back * values[-2])
    return torch.stack(values[1 : c.shape[-1] + 1], dim=-1) + 0 * c


def filled(x: Tensor, c: Tensor) -> Tensor:
    """Powers written into a tensor in place."""
    values = torch.zeros(*x.shape[:-1], c.shape[-1])
    for n in range(c.shape[-1]):
        values[..., n] = torch.tanh(x[..., 0]) ** (n + 1)
    return values + 0 * c


# name -> functions of (x [..., n, 1], centers [k] or [n, k]), result [..., n, k]
BASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gauss": lambda x, c: torch.exp(-((x - c) ** 2)),
    "sine": lambda x, c: torch.sin(x * (1.3 + c)),
    "fourier": lambda x, c: torch.cos(x * torch.arange(1, c.shape[-1] + 1) + c),
    "hat": lambda x, c: torch.relu(1 - (x - c).abs()),
    "cells": lambda x, c: torch.where((x >= c) & (x < c + 0.7), (x - c) ** 2, torch.zeros_like(x)),
    "powers": lambda x, c: torch.tanh(x) ** (2 * torch.arange(c.shape[-1])) + 0 * c,
    "rational": lambda x, c: (x - c) / (1 + (x * c) ** 2),
    "wavelet": lambda x, c: (((x - c) / 0.8) ** 2 - 1) * torch.exp(-0.5 * ((x - c) / 0.8) ** 2),
    "relu_power": lambda x, c: (torch.relu(x - c + 1) * torch.relu(c + 1 - x)) ** 2,
    "order1": lambda x, c: splines(x, c, 1),
    "order3": lambda x, c: splines(x, c, 3),
    "legendre": lambda x, c: recurrence(x, c, lambda n: ((2 * n + 1) / (n + 1), n / (n + 1))),
    "hermite": lambda x, c: recurrence(x, c, lambda n: (2.0, 2.0 * n)),
    "switch": lambda x, c: 1 - torch.tanh((x - c) * 0.7) ** 2,
    "filled": filled,
    "mixture": lambda x, c: torch.exp(-((x - c) ** 2)) + splines(x, c, 2),
    "grown": lambda x, c: torch.sigmoid(x.expand(*x.shape[:-1], c.shape[-1]).clone() - c).sqrt(),
}
NORMS = ("none", "none", "layer_norm", "batch_norm", "squash")
CONTRACTIONS = ("einsum", "linear", "sum", "edges", "columns", "bmm", "loop", "conv1d")


@dataclass(frozen=True)
class Writing:
    """How a layer is written.

    Attributes:
        n_in, n_out, k: sizes.
        basis: which functions.
        own_centers: whether every input has parameters of its own.
        norm: what stands in front of the basis.
        features_first: whether the basis is evaluated on [n, b] instead of [b, n].
        order: order of the batch, the features and the functions afterwards.
        contraction: how the sum is written.
        base: whether there is a SiLU branch; it reads the input itself, not the normalised one.
        tokens: further leading dimension, 0 for none.
    """

    n_in: int
    n_out: int
    k: int
    basis: str
    own_centers: bool
    norm: str
    features_first: bool
    order: tuple[int, ...]
    contraction: str
    base: bool
    tokens: int


class Layer(nn.Module):
    """One layer as ``writing`` says."""

    def __init__(self, writing: Writing, seed: int) -> None:
        super().__init__()
        w = self.writing = writing
        shape = (w.n_in, w.k) if w.own_centers else (w.k,)
        self.centers = nn.Parameter(torch.linspace(-1, 1, w.k) + 0.1 * draw(*shape, seed=seed))
        self.weight = nn.Parameter(draw(w.n_in, w.k, w.n_out, seed=seed + 1))
        self.base = nn.Linear(w.n_in, w.n_out) if w.base else None
        if self.base is not None:
            with torch.no_grad():
                self.base.weight.copy_(draw(w.n_out, w.n_in, seed=seed + 2))
        self.norm = {"layer_norm": nn.LayerNorm(w.n_in), "batch_norm": nn.BatchNorm1d(w.n_in)}.get(w.norm)
        if isinstance(self.norm, nn.BatchNorm1d):
            self.norm.running_mean = 0.3 * draw(w.n_in, seed=seed + 3)
            self.norm.running_var = draw(w.n_in, seed=seed + 4).square() + 0.5

    def forward(self, x: Tensor) -> Tensor:
        w = self.writing
        leading = x.shape[:-1]
        flat = x.reshape(-1, w.n_in)
        normed = torch.tanh(flat) if w.norm == "squash" else flat if self.norm is None else self.norm(flat)
        if w.features_first:
            centers = self.centers.unsqueeze(1) if w.own_centers else self.centers
            basis = BASES[w.basis](normed.t().unsqueeze(-1), centers).transpose(0, 1)
        else:
            basis = BASES[w.basis](normed.unsqueeze(-1), self.centers)  # [b, n, k]
        y = self._contract(basis)
        if self.base is not None:
            y = y + self.base(functional.silu(flat))
        return y.reshape(*leading, w.n_out)

    def _contract(self, basis: Tensor) -> Tensor:
        w = self.writing
        letters = "".join("bnk"[place] for place in w.order)
        moved = basis.permute(w.order)
        back = moved.permute(*(w.order.index(place) for place in range(3)))
        if w.contraction == "einsum":
            return torch.einsum(f"{letters},nko->bo", moved, self.weight)
        if w.contraction == "linear":
            return back.reshape(len(back), -1) @ self.weight.reshape(-1, w.n_out)
        if w.contraction == "sum":
            return torch.einsum(f"{letters}->bnk", moved).unsqueeze(-1).mul(self.weight).sum((1, 2))
        if w.contraction == "edges":
            return torch.einsum(f"{letters},nko->bno", moved, self.weight).sum(1)
        if w.contraction == "bmm":
            return torch.bmm(back.transpose(0, 1), self.weight).sum(0)
        if w.contraction == "loop":
            y = torch.zeros(len(back), w.n_out)
            for n in range(w.n_in):
                y = y + back[:, n] @ self.weight[n]
            return y
        if w.contraction == "conv1d":  # the functions as channels, the inputs as positions
            return functional.conv1d(back.transpose(1, 2), self.weight.permute(2, 1, 0)).squeeze(-1)
        parts = [torch.einsum(f"{letters},nk->b", moved, self.weight[..., o]) for o in range(w.n_out)]
        return torch.stack(parts, dim=1)


writings = st.builds(
    Writing,
    n_in=st.integers(2, 5),
    n_out=st.integers(1, 4),
    k=st.integers(2, 4),
    basis=st.sampled_from(sorted(BASES)),
    own_centers=st.booleans(),
    norm=st.sampled_from(NORMS),
    features_first=st.booleans(),
    order=st.sampled_from(list(itertools.permutations(range(3)))),
    contraction=st.sampled_from(CONTRACTIONS),
    base=st.booleans(),
    tokens=st.sampled_from([0, 0, 2]),
)


def check(writing: Writing, seed: int) -> None:
    second = replace(
        writing, n_in=writing.n_out, n_out=2, norm="none", features_first=False, order=(0, 1, 2), contraction="linear"
    )
    model = nn.Sequential(Layer(writing, seed), Layer(second, seed + 10))
    shape = (writing.tokens, writing.n_in) if writing.tokens else (writing.n_in,)
    program = captured(model, shape)
    assert [layer.name for layer in program.layers()] == ["0", "1"] or writing.n_out == 1
    found = expansions(program)
    assert sum(expansion.k for expansion in found) <= max(writing.k, writing.n_out) + writing.base
    assert contraction(program).n_out == writing.n_out or writing.n_out == 1
    if writing.norm == "none":
        assert [expansion.in_shape for expansion in found] == [shape]


@settings(
    max_examples=4, deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(writing=writings, seed=st.integers(0, 1000))
def test_random_layers(writing: Writing, seed: int) -> None:
    check(writing, seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(writing=writings, seed=st.integers(0, 1000))
def test_many_random_layers(writing: Writing, seed: int) -> None:
    check(writing, seed)


@pytest.mark.slow
@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_every_basis_in_every_contraction(basis: str, contraction: str) -> None:
    number = sorted(BASES).index(basis) + CONTRACTIONS.index(contraction)
    orders = list(itertools.permutations(range(3)))
    writing = Writing(
        3, 2, 3, basis, number % 2 == 0, NORMS[number % 5], number % 3 == 0, orders[number % 6], contraction, False, 0
    )
    check(writing, number)
