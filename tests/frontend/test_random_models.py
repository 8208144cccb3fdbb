"""Random KAN layers: any basis, any order of dimensions, any way to write the contraction."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.frontend.capturing import captured, contraction, draw, expansions

# name -> functions of (x [..., 1], centers [..., k] or [n, k])
BASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gauss": lambda x, c: torch.exp(-((x - c) ** 2)),
    "wave": lambda x, c: torch.sin(x * (1.3 + c)),
    "hat": lambda x, c: torch.relu(1 - (x - c).abs()),
    "cells": lambda x, c: torch.where((x >= c) & (x < c + 0.7), (x - c) ** 2, torch.zeros_like(x)),
    "powers": lambda x, c: torch.tanh(x) ** (2 * torch.arange(c.shape[-1])),
    "rational": lambda x, c: (x - c) / (1 + (x * c) ** 2),
}


@dataclass(frozen=True)
class Writing:
    """How a layer is written."""

    n_in: int
    n_out: int
    k: int
    basis: str
    own_centers: bool
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

    def forward(self, x: Tensor) -> Tensor:
        w = self.writing
        leading = x.shape[:-1]
        flat = x.reshape(-1, w.n_in)
        basis = BASES[w.basis](flat.unsqueeze(-1), self.centers)  # [b, n, k]
        letters = "".join("bnk"[place] for place in w.order)
        moved = basis.permute(w.order)
        if w.contraction == "einsum":
            y = torch.einsum(f"{letters},nko->bo", moved, self.weight)
        elif w.contraction == "linear":
            back = moved.permute(*(w.order.index(place) for place in range(3)))
            y = back.reshape(len(flat), -1) @ self.weight.reshape(-1, w.n_out)
        elif w.contraction == "sum":
            y = torch.einsum(f"{letters}->bnk", moved).unsqueeze(-1).mul(self.weight).sum((1, 2))
        elif w.contraction == "edges":
            edges = torch.einsum(f"{letters},nko->bno", moved, self.weight)
            y = edges.sum(1)
        else:
            parts = [torch.einsum(f"{letters},nk->b", moved, self.weight[..., o]) for o in range(w.n_out)]
            y = torch.stack(parts, dim=1)
        if self.base is not None:
            y = y + self.base(functional.silu(flat))
        return y.reshape(*leading, w.n_out)


writings = st.builds(
    Writing,
    n_in=st.integers(2, 5),
    n_out=st.integers(1, 4),
    k=st.integers(2, 4),
    basis=st.sampled_from(sorted(BASES)),
    own_centers=st.booleans(),
    order=st.sampled_from(list(itertools.permutations(range(3)))),
    contraction=st.sampled_from(["einsum", "linear", "sum", "edges", "columns"]),
    base=st.booleans(),
    tokens=st.sampled_from([0, 0, 2]),
)


def check(writing: Writing, seed: int) -> None:
    second = Writing(
        **{**writing.__dict__, "n_in": writing.n_out, "n_out": 2, "order": (0, 1, 2), "contraction": "linear"}
    )
    model = nn.Sequential(Layer(writing, seed), Layer(second, seed + 10))
    shape = (writing.tokens, writing.n_in) if writing.tokens else (writing.n_in,)
    program = captured(model, shape)
    assert [layer.name for layer in program.layers()] == ["0", "1"] or writing.n_out == 1
    (expansion,) = expansions(program)
    assert expansion.in_shape == shape
    assert expansion.k <= max(writing.k, writing.n_out) + writing.base
    assert contraction(program).n_out == writing.n_out or writing.n_out == 1


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)
@given(writing=writings, seed=st.integers(0, 1000))
def test_random_layers(writing: Writing, seed: int) -> None:
    check(writing, seed)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(writing=writings, seed=st.integers(0, 1000))
def test_many_random_layers(writing: Writing, seed: int) -> None:
    check(writing, seed)
