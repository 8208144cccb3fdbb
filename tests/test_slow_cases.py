"""What the list of slow cases names exists."""

from __future__ import annotations

from pathlib import Path

from tests.slow_cases import LISTED

ROOT = Path(__file__).parents[1]


def test_what_is_listed_exists() -> None:
    texts: dict[str, str] = {}
    for case in LISTED:
        file, *_, name = case.partition("[")[0].split("::")
        text = texts.setdefault(file, (ROOT / file).read_text())
        assert f"def {name}(" in text, case
