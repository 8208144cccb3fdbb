"""Differences of the rows of a table give back the very table, in as few bits as its largest difference needs."""

from __future__ import annotations

import numpy as np
import pytest

from kancompile.ir import smooth_codes


def _gaussians(rows: int) -> np.ndarray:
    x = np.linspace(-3, 3, rows)[:, None]
    return np.round(255 * np.exp(-((x - np.linspace(-2, 2, 5)) ** 2))).astype(np.uint8)


@pytest.mark.parametrize("rows", [32, 64, 192, 256, 1024, 4096])
def test_sums_give_back_the_table(rows: int) -> None:
    table = _gaussians(rows)
    found = smooth_codes(table)
    assert found is not None
    np.testing.assert_array_equal(found.codes(), table)
    wanted = [np.diff(table.astype(int), n=order, axis=0) for order in (1, 2)]
    bits = min(next(b for b in range(2, 10) if -(1 << b - 1) <= d.min() and d.max() < 1 << b - 1) for d in wanted)
    assert found.bits == bits
    assert found.stored_bytes() < table.size + found.first.nbytes


def test_more_rows_take_fewer_bits() -> None:
    bits = [found.bits for rows in (64, 256, 2048) if (found := smooth_codes(_gaussians(rows))) is not None]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] == 2


def test_tables_that_jump_and_short_ones_stay() -> None:
    jumps = np.random.default_rng(0).integers(0, 256, (64, 3)).astype(np.uint8)
    assert smooth_codes(jumps) is None
    assert smooth_codes(_gaussians(16)[:8]) is None
    flat = smooth_codes(np.full((32, 2), 255, np.uint8))
    assert flat is not None
    assert (flat.codes() == 255).all()
