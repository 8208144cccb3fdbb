"""Functions of pairs against singular values that numpy finds, their weights against its least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kancompile.passes.reduce_functions.fit import PRIOR, LeastSquares
from kancompile.passes.reduce_functions.join import _fewest
from kancompile.passes.reduce_functions.look_up_time import MOST_COLUMNS, is_faster, most_columns
from kancompile.passes.reduce_functions.words import FLOOR, PLANES, Words, find_words
from kancompile.recipe import DEFAULT_PROFILE, package_profile

COSTS = package_profile(DEFAULT_PROFILE).look_up
LEVELS = 6


def drawn(
    n_in: int, k: int, n_out: int, n: int = 300, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw values of functions at the rows, weights, and row numbers of samples that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(LEVELS, n_in, k, generator=generator)
    weight = torch.randn(n_out, n_in, k, generator=generator) * torch.logspace(0, -1, n_in)[:, None]
    common = torch.randint(0, LEVELS // 2 + 1, (n, 1), generator=generator)
    rows = common + torch.randint(0, LEVELS // 2, (n, n_in), generator=generator)
    return values, weight, rows


def outputs(words: Words, rows: torch.Tensor) -> np.ndarray:
    """Add up what the words contribute to every output, less its mean."""
    total = np.zeros((len(rows), len(words.weight)))
    for inputs, values in zip(words.members.numpy(), words.values.double().numpy(), strict=True):
        for word, own in enumerate(inputs):
            total += values[:, word, rows[:, own].numpy()].T @ words.weight[:, :, word].double().numpy().T
    return total - total.mean(0)


def layer_outputs(values: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    phi = np.stack([values[rows[:, i], i].double().numpy() for i in range(rows.shape[1])], 1)
    total = np.einsum("nik,oik->no", phi, weight.double().numpy())
    return total - total.mean(0)


def energies_by_hand(values: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    """Squared singular values of ``[W_a W_b] C^1/2`` of one pair, ``C`` with its share of rows that are all alike."""
    v, r = values.double().numpy(), rows.numpy()
    mixed = [
        (1 - FLOOR) * v[r[:, i], i].mean(0) + FLOOR * v[:, i].mean(0)  # the mean that functions are counted from
        for i in (0, 1)
    ]
    seen = np.concatenate([v[r[:, i], i] - mixed[i] for i in (0, 1)], 1)
    covariance = (1 - FLOOR) * seen.T @ seen / len(r)
    k = values.shape[2]
    for i in (0, 1):
        even = v[:, i] - v[:, i].mean(0)
        covariance[i * k : (i + 1) * k, i * k : (i + 1) * k] += FLOOR * even.T @ even / LEVELS
    both = np.concatenate([weight[:, i].double().numpy() for i in (0, 1)], 1)
    root = np.linalg.cholesky(covariance + 1e-13 * np.eye(2 * k))
    return np.linalg.svd(both @ root, compute_uv=False) ** 2


def test_directions_are_those_of_the_singular_values() -> None:
    values, weight, rows = drawn(2, 3, 8)
    words = find_words(values, weight, rows, 10)
    assert len(words) == 2
    expected = energies_by_hand(values, weight, rows)
    directions = torch.cat([words.weight[:, :, word] for word in range(2)], 1).double().numpy()
    np.testing.assert_allclose(directions.T @ directions, np.eye(6), atol=1e-5)
    # what one direction carries, measured on the samples and on rows that are all alike
    found = []
    for word in range(2):
        for plane in range(PLANES):
            parts = [words.values[m, plane, word].double().numpy() for m in (0, 1)]
            seen = sum(part[rows[:, words.members[m, word]].numpy()] for m, part in enumerate(parts))
            floor = sum(part.var() for part in parts) * FLOOR
            found.append((1 - FLOOR) * np.mean(np.square(seen)) + floor)
    np.testing.assert_allclose(found, expected[:6], rtol=1e-4)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(("k", "n_out"), [(3, 5), (1, 4), (2, 9), (4, 1), (5, 30)])
def test_all_words_together_are_the_layer(n_in: int, k: int, n_out: int) -> None:
    values, weight, rows = drawn(n_in, k, n_out)
    words = find_words(values, weight, rows, 1000)
    exact = layer_outputs(values, weight, rows)
    np.testing.assert_allclose(outputs(words, rows), exact, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("constant", [(0,), (4,), (1, 3), (0, 1, 2)])
def test_inputs_that_say_nothing_get_no_words(constant: tuple[int, ...]) -> None:
    values, weight, rows = drawn(5, 3, 6)
    values[:, constant] = 0.7
    words = find_words(values, weight, rows, 1000)
    exact = layer_outputs(values, weight, rows)
    np.testing.assert_allclose(outputs(words, rows), exact, atol=1e-4 * np.abs(exact).max())
    live = 5 - len(constant)
    assert len(words) <= -(-live // 2) * -(-2 * 3 // PLANES)
    silent = torch.isin(words.members, torch.tensor(constant))
    assert not words.values.abs().amax((1, 3))[silent].any()


def test_more_words_leave_less() -> None:
    values, weight, rows = drawn(9, 4, 12)
    words = find_words(values, weight, rows, 1000)
    exact = layer_outputs(values, weight, rows)
    independent = torch.randint(0, LEVELS, (4000, 9), generator=torch.Generator().manual_seed(4))
    for own in (rows, independent):
        exact = layer_outputs(values, weight, own)
        left = [np.square(outputs(words.first(count), own) - exact).mean() for count in range(len(words) + 1)]
        assert left[-1] < 1e-8 * left[0]
        assert left[len(words) // 2] < 0.3 * left[0]
    assert find_words(values, weight, rows, 2).members.tolist() == words.first(2).members.tolist()


def test_no_variance_gives_no_words() -> None:
    values, weight, rows = drawn(4, 3, 6)
    assert len(find_words(torch.ones_like(values), weight, rows, 10)) == 0


def test_order_of_inputs_keeps_the_words() -> None:
    values, weight, rows = drawn(8, 3, 6)
    words = find_words(values, weight, rows, 7)
    ordered = words.in_order()
    assert ordered.members[0].tolist() == sorted(words.members[0].tolist())
    np.testing.assert_allclose(outputs(ordered, rows), outputs(words, rows), atol=1e-6)


def test_weights_are_least_squares_with_rows_of_independent_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 128, (60, 8), generator=generator)
    weight = torch.randn(3, 8, generator=generator)
    output = codes.float() @ (weight + 0.1 * torch.randn(3, 8, generator=generator)).T
    columns = torch.tensor([0, 2, 3, 7])
    fitted = LeastSquares(codes, output, weight).solve(columns)
    # a row for each column, of the length that PRIOR samples of its variance have, whose output the given weight says
    centered = (codes[:, columns].double() - codes[:, columns].double().mean(0)).numpy()
    length = np.sqrt(PRIOR * centered.var(0))
    given = weight[:, columns].double().numpy()
    left = np.concatenate([centered, np.diag(length)])
    right = np.concatenate([(output.double() - output.double().mean(0)).numpy(), (given * length).T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(fitted.weight.numpy(), expected, rtol=1e-4, atol=1e-5)
    residual = (fitted(codes[:, columns]) - output).double().mean(0)
    assert float(residual.abs().max()) < 1e-4 * float(output.abs().max())


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40, 41, 1366])
@pytest.mark.parametrize("needed", [1, 2, 3, 20, 39, 40, 41, 1366, 1367])
def test_the_fewest_that_suffice_are_found(most: int, needed: int) -> None:
    tried: list[int] = []

    def lost(count: int) -> float:
        tried.append(count)
        return 0.1 if count >= needed else 0.3

    found = _fewest(lost, most, 0.1)
    assert all(1 <= count <= most for count in tried)
    if needed > most:
        assert found is None
        assert tried == [most]
        return
    assert found is not None
    assert needed <= found <= min(most, 1.05 * needed + 1)
    assert len(tried) < 12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 3000), st.integers(1, 20), st.integers(1, 512), st.sampled_from([(1,), (16,), (256,), (1, 16, 256)])
)
def test_the_most_columns_are_still_faster(n_in: int, k: int, n_out: int, batch: tuple[int, ...]) -> None:
    most = most_columns([(n_in, k)], n_out, COSTS, batch)
    limit = min(n_in * k // 2, MOST_COLUMNS) // PLANES * PLANES
    assert 0 <= most <= limit
    assert most % PLANES == 0
    assert not most or is_faster([(n_in, k)], n_out, most, COSTS, batch)
    assert most == limit or not is_faster([(n_in, k)], n_out, most + PLANES, COSTS, batch)


def test_wide_layers_are_faster_in_pairs_and_small_ones_are_not() -> None:
    assert most_columns([(784, 9)], 64, COSTS) > 1000
    assert most_columns([(16, 9)], 10, COSTS) == 0
    assert most_columns([(784, 9)], 64, COSTS, (256,)) > most_columns([(784, 9)], 64, COSTS, (1,))
