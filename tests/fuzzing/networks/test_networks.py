"""Networks drawn at random compile to files that compute what PyTorch computes, or are refused; nothing else happens."""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kancompile.compiler import preparation
from kancompile.errors import KanCompileError
from kancompile.runtimes import RUNTIMES
from tests.fuzzing.networks import run as running
from tests.fuzzing.networks.drawing import drawn
from tests.fuzzing.networks.judging import Verdict, difference
from tests.fuzzing.networks.one import Drawn, verdict_on
from tests.fuzzing.networks.shrinking import script, shrunk
from tests.tools import TOOLS

QUICK = (1, 22, 26)
MANY = [number for number in range(60) if number not in QUICK]


def marked(numbers: Iterable[int], recipes: int = 1) -> list[Any]:
    """List numbers as parameters of a test that names the runtimes which their programs are drawn for."""
    targets = {number: {drawn(number, again)["target"] for again in range(recipes)} for number in numbers}
    return [
        pytest.param(number, marks=pytest.mark.needs(*sorted(targets[number] & RUNTIMES.keys() & TOOLS.keys())))
        for number in targets
    ]


def check(number: int, again: int = 0) -> None:
    found = verdict_on(drawn(number, again))
    assert not found.is_fault, f"{found.kind}: {found.detail}; shrink it: python -m tests.fuzzing.networks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", marked(QUICK, 4))
def test_a_network_by_four_recipes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    once = running.CapturedOnce()
    monkeypatch.setattr(preparation, "capture", once)
    for again in range(4):
        check(number, again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", marked(MANY))
def test_many_networks(number: int) -> None:
    check(number)


def test_a_number_is_always_the_same_network() -> None:
    assert json.dumps(drawn(5)) == json.dumps(drawn(5)) != json.dumps(drawn(6))


def test_other_recipes_are_drawn_for_the_same_network() -> None:
    several = [drawn(5, again) for again in range(4)]
    assert several[0] == drawn(5)
    assert all(one[key] == several[0][key] for one in several for key in ("network", "data", "seed"))
    assert len({json.dumps([one["recipe"], one["target"]]) for one in several}) == 4


def test_a_network_is_captured_once_for_its_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []

    def capture(model: str, example: torch.Tensor, **options: object) -> str:
        captured.append(model)
        if model == "refused":
            raise KanCompileError("no")
        return f"{model} of {len(example)}"

    monkeypatch.setattr(running, "capture", capture)
    once = running.CapturedOnce()
    once.about = "network 1"
    assert [once("one", torch.zeros(rows, 2)) for rows in (3, 3, 4)] == ["one of 3", "one of 3", "one of 4"]
    once.about = "network 2"
    for _ in range(2):
        with pytest.raises(KanCompileError, match="no"):
            once("refused", torch.zeros(4, 2))
    assert captured == ["one", "one", "refused"]


def test_a_log_of_other_programs_is_not_gone_on_with(tmp_path: Path) -> None:
    log = tmp_path / "fuzz.json"
    log.write_text(json.dumps({"next": 3}))
    with pytest.raises(SystemExit, match="found 1 recipes each, not 4; move it away"):
        running.run(9, 1e9, log, recipes=4)


def test_differences_are_told() -> None:
    one = np.arange(40, dtype=np.float32).reshape(20, 2)
    other = one.copy()
    assert difference([one], [other], True, "a and b") is None
    other[3, 1] = np.nextafter(other[3, 1], 100)
    assert difference([one], [other], False, "a and b") is None
    assert difference([one], [other], True, "a and b") == Verdict(
        "a and b: other bits", "1 of 40 outputs, by up to 4.13e-08 of their spread"
    )
    assert difference([one], [one + 1], False, "a and b").kind == "a and b: other values"
    assert difference([one], [one[:, :1]], False, "a and b").kind == "a and b: another shape"
    one[0] = other[0] = np.nan
    assert difference([one], [one.copy()], True, "a and b") is None


def test_programs_hang_by_the_time_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that take as long by the clock, the one that computes is ended, and the next one gets a process of its own."""

    def judge(given: Drawn) -> Verdict:
        if given["seed"] == 1:
            time.sleep(0.6)
            return Verdict("equal")
        while time.process_time() < 60:
            pass
        return Verdict("was not ended")

    monkeypatch.setattr(running, "_SECONDS_EACH", 0.3)
    monkeypatch.setattr(running, "verdict_on", judge)
    worker = running.Worker()
    assert worker({"seed": 0}) == Verdict("hung", "0.3 s")
    assert worker({"seed": 1}) == worker({"seed": 1}) == Verdict("equal")
    worker.stop()


def test_failures_become_small_scripts_that_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network with some layers, what remains is the one that fails, and a run goes on where its log ends."""

    def has_steps(given: Drawn) -> bool:
        return '"basis": "steps"' in json.dumps(given)

    number = next(number for number in range(500) if has_steps(drawn(number)) and drawn(number)["recipe"])
    less = shrunk(drawn(number), has_steps, 60)
    assert has_steps(less)
    assert less["recipe"] == {}
    assert len(json.dumps(less["network"])) < len(json.dumps(drawn(number)["network"]))
    (tmp_path / "script.py").write_text(script(less, "a test"))
    alone = runpy.run_path(str(tmp_path / "script.py"), run_name="script")
    assert alone["DRAWN"] == less
    assert alone["verdict_on"](less).kind == verdict_on(less).kind

    class Judge(SimpleNamespace):
        seconds = 0.0

        def __call__(self, given: Drawn) -> Verdict:
            return Verdict("wrong") if has_steps(given) else Verdict("equal")

    monkeypatch.setattr(running, "Worker", lambda: Judge(stop=lambda: None))
    log = tmp_path / "fuzz.json"
    running.run(number, 1e9, log)
    assert running.run(number + 1, 1e9, log, 60) >= 1
    known = json.loads(log.read_text())
    assert known["next"] == sum(known["kinds"].values()) == number + 1
    assert known["failures"][-1]["number"] == number
    assert (tmp_path / f"fuzz-{number}.py").read_text() == script(less, "wrong")
