"""Every row of the table in docs/troubleshooting.md: the mistake is made, and the answer holds what the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kancompile.errors import KanCompileError
from tests.newcomer_mistakes import MISTAKES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
ROWS = dict(
    re.findall(
        r"^\| (?!mistake)([^|]+?) \| ([^|]+?) \|$", PAGE.read_text().partition("## What newcomers meet")[2], re.M
    )
)


def said(mistake: str, folder: Path) -> str:
    try:
        return str(MISTAKES[mistake](folder))
    except KanCompileError as error:
        return str(error)


def test_the_table_has_every_mistake() -> None:
    assert list(ROWS) == list(MISTAKES)
    assert len(ROWS) >= 30


SLOW = {"too few bytes", "forty samples", "a limit out of reach"}
"""Compilations of several files, whose messages tests of the budget, of fresh data and of the gate check as well."""


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MISTAKES]
)
def test_the_answer_names_cause_and_way_out(mistake: str, tmp_path: Path) -> None:
    answer = said(mistake, tmp_path)
    position = 0
    for part in ROWS[mistake].split("..."):
        found = answer.find(part.strip(), position)
        assert found >= 0, f"{part.strip()!r} is not in {answer!r}"
        position = found + len(part.strip())
