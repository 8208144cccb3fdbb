"""Samples that judge are others than those that calibrate, and more of them where there are many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kancompile.data.held_out import MOST_HELD_OUT, read_divided


def numbered(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None].repeat(2, 1)


@given(st.integers(2, 400), st.integers(2, 300), st.sampled_from([0.0, 0.1, 0.2, 0.5]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_and_of_the_sizes_asked_for(n: int, calibration: int, share: float, seed: int) -> None:
    divided = read_divided(numbered(n), calibration, share, seed)
    fitting, judging = (set(part.inputs[:, 0].tolist()) for part in (divided.fitting, divided.judging))
    if not divided.is_held_out:
        assert share == 0 or n < 16
        assert judging == set(range(n)) or len(judging) == calibration
        return
    assert not fitting & judging
    assert 2 <= len(fitting) <= max(2, calibration)
    assert len(judging) >= min(round(n * share), n - 2)
    again = read_divided(numbered(n), calibration, share, seed)
    assert again.fitting.sha256() == divided.fitting.sha256()


def test_of_many_samples_many_judge() -> None:
    divided = read_divided(numbered(60000), 4096, 0.2, 0)
    assert len(divided.fitting) == 4096
    assert len(divided.judging) == MOST_HELD_OUT
    assert divided.judged_on == "10,000 held-out calibration samples"


@pytest.mark.parametrize("n", [256, 1000])
def test_of_few_samples_a_share_judges(n: int) -> None:
    divided = read_divided(numbered(n), 4096, 0.2, 0)
    assert len(divided.judging) == round(0.2 * n)
    assert len(divided.fitting) == n - round(0.2 * n)
