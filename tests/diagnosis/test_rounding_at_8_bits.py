"""Overlapping functions with large weights of alternating sign: rounding each to nearest leaves errors that do not cancel."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.diagnosis.cause import METHOD


class Wide(nn.Module):
    """A least-squares fit in a basis of wide Lorentzians."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.centers = nn.Buffer(torch.linspace(-5, 6, 12))
        self.norm = nn.LayerNorm(n_in)
        self.weight = nn.Parameter(torch.zeros(n_out, n_in, 12))

    def functions(self, x: Tensor) -> Tensor:
        return 1 / ((self.norm(x)[..., None] - self.centers) ** 2 + 1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bik,oik->bo", self.functions(x), self.weight)


@lru_cache
def fitted() -> tuple[Wide, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(1600, 40, generator=generator) + 0.4
    y = torch.sin(x @ torch.randn(40, 6, generator=generator) / 3) + 0.5 * x[:, :6] ** 2
    model = Wide(40, 6).eval()
    with torch.no_grad():
        a = model.functions(x).flatten(1)
        found = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1]), a.T @ y)
        model.weight.copy_(found.T.reshape(6, 40, 12))
    return model, x


def sqnr_db(recipe: dict[str, object]) -> float:
    model, x = fitted()
    return kancompile.compile(model, x[:600], recipe=recipe | {"goal_sqnr": None}).validate(x[600:]).compiled.sqnr_db


def test_auto_takes_another_rounding_at_8_bits_where_it_measures_better() -> None:
    nearest, chosen = sqnr_db({"method": "uniform"}), sqnr_db({})
    assert chosen >= nearest + 3
    assert chosen >= sqnr_db({"method": "gptq"}) - 0.5


def test_a_diagnosis_lists_the_change_and_calls_it_free() -> None:
    model, x = fitted()
    found = kancompile.diagnose(model, x[:600], x[600:], recipe={"method": "uniform"})
    first = found.causes[0]
    assert first.kind == METHOD
    assert first.change.is_free
    assert first.effect.gain_db is not None
    assert first.effect.predicted_db == pytest.approx(first.effect.gain_db, abs=2.5)
    assert "(free: no more bytes, no more time)" in found.text()
    tuned = kancompile.tune(model, x[:600], x[600:], recipe={"method": "uniform"}, min_sqnr=found.outcome.worst_db + 2)
    assert tuned.is_met
    assert [step.change.is_free for step in tuned.steps] == [True]
