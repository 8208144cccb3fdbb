"""Sections of pages that a command writes, between markers, beside what another one writes."""

from __future__ import annotations

FIELD_SECTION = "field"
"""What ``benchmarks.field`` writes into docs/compatibility.md."""


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def marked_section(text: str, name: str) -> str | None:
    """Give the lines of a page between the markers of a section; ``None`` where it has none."""
    begin, end = _markers(name)
    return text.partition(begin)[2].partition(end)[0].strip("\n") if begin in text and end in text else None


def replace_section(text: str, name: str, section: str) -> str:
    """Put a section between its markers, at the end of a page that has none."""
    begin, end = _markers(name)
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    return f"{before if found else text.rstrip() + chr(10) * 2}{begin}\n{section.strip(chr(10))}\n{end}{after}"
