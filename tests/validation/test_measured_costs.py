"""Costs of operators: found exactly from amounts that obey them, and measured by probes that cover a whole profile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kancompile.cli import main
from kancompile.recipe import DEFAULT_PROFILE, PROFILES, package_profile, read_profile
from kancompile.validation import Probe, costs_of, probes
from kancompile.validation.measured_costs import prepared

GROUPS = list(probes())


@pytest.mark.parametrize("name", PROFILES)
def test_amounts_that_obey_a_profile_give_it_back(name: str) -> None:
    expected = package_profile(name).to_dict()

    def taken(probe: Probe) -> float:
        any_call = 0.0 if "call" in probe.counts else 900.0
        return any_call + sum(count * expected[probe.section].get(cost, 0.01) for cost, count in probe.counts.items())

    found = costs_of(GROUPS, [[taken(probe) for probe in group] for group in GROUPS])
    for section, costs in found.items():
        assert costs == pytest.approx(expected[section], rel=6e-3, abs=1e-4)
    read_profile({"name": "found", **found})  # all costs of both sections, and no other


def test_probes_grow_in_what_they_measure_and_return_what_they_say() -> None:
    for group in GROUPS:
        for cost in {name for probe in group for name in probe.counts} - {"call"}:
            assert len({probe.counts.get(cost, 0) for probe in group}) > 1, cost
    prepared(GROUPS[0][0])()
    prepared(GROUPS[1][0])()
    with pytest.raises(Exception, match="invalid dimensions"):
        prepared(replace(GROUPS[1][0], outputs={"y": (np.uint8, (15,))}))()


def test_the_command_writes_a_profile_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    assert main(["profile", "--out", str(path), "--repeats", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    profile = read_profile(path)
    assert (profile.name, profile.to_dict()["look_up"]) == ("mine", printed["look_up"])
    assert path.read_text().startswith("# Measured by kancompile profile")
    usual = package_profile(DEFAULT_PROFILE)
    # whatever the machine, a product takes less than a look-up, and that less than a node
    for costs in (profile.look_up, usual.look_up):
        assert costs.product < costs.gather < costs.node


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--out", "p.json"], "suffix '.json', expected '.toml'"),
        (["--out", "x86.toml"], "'x86', a profile of the package"),
        (["--out", "here.toml"], "here.toml'.*exists"),
        (["--out", "p.toml", "--repeats", "0"], "repeats is 0, expected at least 1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.toml").touch()
    assert main(["profile", *arguments]) == 2
    assert re.search(text, capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"here.toml"}


def test_work_that_takes_too_little_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    group = GROUPS[0]
    assert costs_of([group], [[1000.0 for _ in group]]) == {"look_up": {"node": 1e-4, "call": 1000.0}}
    assert "look_up: node takes too little" in capsys.readouterr().err
