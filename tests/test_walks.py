"""The walks of the documentation, each from a wheel in an environment of its own; the time that each takes is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.walks import WALK_NAMES, environment_of_a_wheel, run_walk

MOST_SECONDS = {"newcomer": 300, "table": 300}
"""Of processors, from a checkpoint or a CSV file to a validated file; by the clock it depends on what else a machine does."""

pytestmark = [pytest.mark.slow, pytest.mark.needs("bash", "gcc", "matplotlib", "pykan")]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_of_a_wheel(tmp_path_factory.mktemp("wheel"), borrow=True)


@pytest.mark.parametrize("walk", WALK_NAMES)
def test_a_walk_ends_in_time(python: Path, walk: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_walk(walk, python)
    with capsys.disabled():
        print(f"\n{walk}: {found.seconds:.0f} s, of processors {found.processor_seconds:.0f} s")
    assert found.exit_code == 0, found.text
    assert found.processor_seconds < MOST_SECONDS.get(walk, 600)
