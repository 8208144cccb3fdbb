"""Tests and cases of them that run with ``-m slow`` only: ``slow_cases.txt`` lists them, a line each.

``.ci/slow_cases.py`` chooses cases by what they took, of tests of which others stay in the default run; some long tests of what
others test as well are listed by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

LISTED = frozenset(Path(__file__).with_suffix(".txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is listed."""
    for item in items:
        if item.nodeid in LISTED:
            item.add_marker(pytest.mark.slow)
