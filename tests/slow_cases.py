"""Cases of parametrized tests that run with ``-m slow`` only: ``slow_cases.txt`` lists them, a line each.

``.ci/slow_cases.py`` chooses them by what they took. Other cases of the same tests stay in the default run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

LISTED = frozenset(Path(__file__).with_suffix(".txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that are listed."""
    for item in items:
        if item.nodeid in LISTED:
            item.add_marker(pytest.mark.slow)
