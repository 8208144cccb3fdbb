"""The plot of the benchmark page is drawn from its tables, and README says of them what they say."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.needs("matplotlib")


def test_readme_repeats_the_table_of_compatibility() -> None:
    from benchmarks.pictures import speed

    found = speed()
    values = [value for family in found.values() for value in family]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"at batch 32, {statistics.median(values):.1f} times as fast as the float export over {len(values)} small"
        in text
    )
    for name, words in (("B-spline", "B-splines"), ("radial basis", "radial bases"), ("polynomial", "polynomials")):
        low, high = min(found[name]), max(found[name])
        assert f"{words} {low:.1f} to {high:.{0 if high >= 10 else 1}f}" in text
    assert "others" not in found  # every family has a name


def test_the_plots_are_those_of_the_tables() -> None:
    from benchmarks.pictures import BITS, accuracy_lost, accuracy_plot, speed_plot

    lost = accuracy_lost()
    assert set(lost["efficient-KAN, MNIST (97.02)"]) == {"uniform", "gptq", "awq+gptq", "adaround", "brecq"}
    assert all(len(values) <= len(BITS) for methods in lost.values() for values in methods.values())
    assert len(accuracy_plot().axes[0].lines) == len(lost) + 1
    assert len(speed_plot().axes[0].get_yticklabels()) == 6
