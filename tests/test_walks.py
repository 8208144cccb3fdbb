"""The walks of the documentation, each from a wheel in an environment of its own; the time that each takes is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.walks import WALK_NAMES, environment_of_a_wheel, seconds_of

MOST_SECONDS = 300  # from a checkpoint or a table to a validated file

pytestmark = [pytest.mark.slow, pytest.mark.needs("gcc", "matplotlib", "pykan")]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_of_a_wheel(tmp_path_factory.mktemp("wheel"), borrow=True)


@pytest.mark.parametrize("walk", WALK_NAMES)
def test_a_walk_ends_in_time(python: Path, walk: str, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, code, text = seconds_of(walk, python)
    with capsys.disabled():
        print(f"\n{walk}: {seconds:.0f} s")
    assert code == 0, text
    assert seconds < MOST_SECONDS
