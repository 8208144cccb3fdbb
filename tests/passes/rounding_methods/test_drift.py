"""Weights that make up for drift minimize the squared error that they are stated for; alpha is chosen on other samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kancompile.passes.rounding_methods.drift import LADDER, DriftRows, full_change, make_up
from tests.passes.rounding_methods.rounding_problems import generator, table_codes


def drifted(n: int, c: int = 30, n_out: int = 4, drift: float = 6.0, dead: int = 2) -> tuple[DriftRows, Tensor]:
    """Rows of a layer whose features are ``drift`` away, by a linear map and noise, from those of the float program."""
    codes = table_codes(n, c, seed=0, dead=dead)
    weight = torch.randn(n_out, c, generator=generator(1)) * 0.01
    mixing = torch.randn(c, c, generator=generator(2)) / c**0.5
    centered = codes.float() - codes.float().mean(0)
    moved = 3 + drift * (centered @ mixing / centered.std() + 0.1 * torch.randn(n, c, generator=generator(3)))
    return DriftRows(codes, moved @ weight.T, torch.arange(n)), weight


@pytest.mark.parametrize("n", [20, 200])
def test_full_change_minimizes_the_damped_squared_error(n: int) -> None:
    rows, _ = drifted(n)
    found = full_change(rows, "a layer", damping=0.01)
    features = rows.features.double().numpy()
    centered = features - features.mean(0)
    live = centered.var(0) > 0
    strength = 0.01 * centered.var(0)[live].mean()
    # |R - Q W|^2 + n lambda |W|^2 as one least-squares problem of more rows
    stacked = np.concatenate([centered, np.sqrt(n * strength) * np.eye(30)])
    missing = rows.missing.double().numpy()
    targets = np.concatenate([missing - missing.mean(0), np.zeros((30, 4))])
    expected = np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    assert np.abs(expected[:, ~live]).max() < 1e-12
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())
    left = rows.missing - rows.features.float() @ found.weight.T - found.bias
    assert left.mean(0).abs().max() < 1e-4 * rows.missing.abs().max(), "the bias takes the mean"


def test_alpha_follows_what_samples_that_did_not_fit_say() -> None:
    folds = torch.arange(400) % 5
    rows, _ = drifted(400)
    found = make_up([rows], folds, "a layer")
    assert found is not None
    assert found.alpha == LADDER[-1]
    assert found.after < 0.05 * found.before
    # the same missing outputs beside other features: nothing to learn
    rows = DriftRows(rows.features.flip(0), rows.missing - rows.missing.mean(0), rows.sample)
    chance = make_up([rows], folds, "a layer")
    assert chance is not None
    assert chance.alpha == 0
    assert chance.changes == ()
    assert chance.before == chance.after


def test_reporting_samples_take_no_part() -> None:
    folds = torch.arange(400) % 5
    rows, _ = drifted(400)
    spoiled = DriftRows(
        rows.features, torch.where((folds == 4)[:, None], rows.missing.flip(1), rows.missing), rows.sample
    )
    first, second = make_up([rows], folds, "a layer"), make_up([spoiled], folds, "a layer")
    assert first is not None
    assert second is not None
    assert torch.equal(first.changes[0].weight, second.changes[0].weight)
    assert second.after > first.after


def test_too_few_samples_change_nothing() -> None:
    rows, _ = drifted(400)
    assert make_up([DriftRows(rows.features, rows.missing, rows.sample % 4)], torch.arange(4), "a layer") is None
