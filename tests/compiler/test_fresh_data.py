"""With few calibration samples the error on others is estimated, and said in Python as on the command line."""

from __future__ import annotations

import pytest

import kancompile
from tests.compiled_kan import make_inputs, make_model


@pytest.mark.parametrize("n", [20, pytest.param(40, marks=pytest.mark.slow)])
def test_the_estimate_is_near_the_error_on_fresh_data(n: int, capfd: pytest.CaptureFixture[str]) -> None:
    made = kancompile.compile(make_model(), make_inputs(n, seed=3))
    found = made.manifest["fresh_data"]
    fresh = made.validate(make_inputs(2000, seed=4), min_sqnr=-100).compiled.worst_db
    assert found["samples"] == n
    assert found["seen_db"] > fresh + 3  # these very samples flatter the file
    assert found["fresh_db"] == pytest.approx(fresh, abs=5)
    (note,) = [note for note in made.manifest["notes"] if note.startswith("fresh data:")]
    assert f"only {n} calibration samples" in note
    assert note in capfd.readouterr().err


def test_from_64_samples_on_nothing_is_estimated() -> None:
    made = kancompile.compile(make_model(), make_inputs(64, seed=3))
    assert made.manifest["fresh_data"] is None
    assert not any(note.startswith("fresh data:") for note in made.manifest["notes"])
