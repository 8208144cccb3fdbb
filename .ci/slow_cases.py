"""Choose the cases of parametrized tests that run with ``-m slow`` only, so that the default run keeps its time.

python .ci/slow_cases.py SECONDS REPORT.xml [MORE.xml ...] > tests/slow_cases.txt   # what pytest's --junit-xml wrote

The costliest cases go first, until what is left takes SECONDS of one process; of every test the first case and one more stay.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from xml.etree import ElementTree

from skipped_tests import name_of

LEAST_SECONDS = 1.0


def durations(reports: list[str]) -> dict[str, float]:
    """Map tests, as pytest's command line names them, to the seconds that they took, in the order of the reports."""
    found: dict[str, float] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = name_of(f"{case.get('classname')}::{case.get('name')}")
            found[name] = max(found.get(name, 0.0), float(case.get("time", 0)))
    return found


def choose(seconds: float, found: dict[str, float]) -> list[str]:
    """List the cases that are slow ones from now on."""
    cases = defaultdict(list)
    for name in found:
        cases[name.partition("[")[0]].append(name)
    left, chosen = sum(found.values()), []
    for name in sorted(found, key=found.__getitem__, reverse=True):
        own = cases[name.partition("[")[0]]
        if left <= seconds or found[name] < LEAST_SECONDS:
            break
        if len(own) > 2 and name != own[0]:
            own.remove(name)
            chosen.append(name)
            left -= found[name]
    print(f"{len(chosen)} cases; {left:.0f} of {sum(found.values()):.0f} s stay", file=sys.stderr)
    return chosen


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print("\n".join(sorted(choose(float(sys.argv[1]), durations(sys.argv[2:])))))
