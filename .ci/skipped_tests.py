"""List the tests that a run skipped, or what a second run with more tools made of them.

python .ci/skipped_tests.py BARE.xml [MORE.xml]   # what pytest's --junit-xml wrote
python .ci/skipped_tests.py --ids BARE.xml        # as pytest takes them: pytest @file
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def tests(report: str) -> dict[str, str | None]:
    """Map the tests of a report to the reason for which they were skipped, ``None`` where they ran."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        found[f"{case.get('classname')}::{case.get('name')}"] = None if skipped is None else skipped.get("message")
    return found


def name_of(test: str) -> str:
    """Name a test of a report as pytest's command line does, ``tests/file.py::test``."""
    place, _, name = test.partition("::")
    parts = place.split(".")
    # the module's path, then the classes inside it
    length = next(n for n in range(len(parts), 0, -1) if Path(*parts[:n]).with_suffix(".py").exists())
    return "::".join([f"{'/'.join(parts[:length])}.py", *parts[length:], name])


def ids(report: str) -> list[str]:
    """Name the tests that a run skipped."""
    return [name_of(test) for test, reason in tests(report).items() if reason is not None]


def show(title: str, found: dict[str, str | None]) -> None:
    """Print tests, with the reason where they were skipped."""
    print(f"{len(found)} {title}")
    for test, reason in sorted(found.items()):
        print(f"  {test}" + (f": {reason}" if reason else ""))


def main(first: str, second: str | None = None) -> None:
    """Print one list, or three."""
    if first == "--ids":
        print("\n".join(ids(str(second))))
        return
    before = tests(first)
    skipped = {test: reason for test, reason in before.items() if reason is not None}
    if second is None:
        show("tests were skipped", skipped)
        return
    after = tests(second)
    again = {test: reason for test, reason in after.items() if reason is not None}
    show("tests were skipped at first and then ran", {test: None for test in skipped if test not in again})
    show("tests were skipped both times", {test: again[test] for test in skipped if test in again})


if __name__ == "__main__":
    main(*sys.argv[1:])
