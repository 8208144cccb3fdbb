"""List the tests that a run skipped, or what a second run with more tools made of them.

python .ci/skipped_tests.py BARE.xml [FULL.xml]   # what pytest's --junit-xml wrote
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree


def tests(report: str) -> dict[str, str | None]:
    """Map the tests of a report to the reason for which they were skipped, ``None`` where they ran."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        found[f"{case.get('classname')}::{case.get('name')}"] = None if skipped is None else skipped.get("message")
    return found


def show(title: str, found: dict[str, str | None]) -> None:
    """Print tests, with the reason where they were skipped."""
    print(f"{len(found)} {title}")
    for test, reason in sorted(found.items()):
        print(f"  {test}" + (f": {reason}" if reason else ""))


def main(first: str, second: str | None = None) -> None:
    """Print one list, or three."""
    before = tests(first)
    skipped = {test: reason for test, reason in before.items() if reason is not None}
    if second is None:
        show("tests were skipped", skipped)
        return
    after = tests(second)
    again = {test: reason for test, reason in after.items() if reason is not None}
    show("tests were skipped at first and then ran", {test: None for test in skipped if test not in again})
    show("tests were skipped both times", {test: again[test] for test in skipped if test in again})
    show("tests ran at first and were then skipped", {test: again[test] for test in again if test not in skipped})


if __name__ == "__main__":
    main(*sys.argv[1:])
