"""Several processes share out chunks of samples, and each ends with the bits of one alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kancompile import processes
from kancompile.cli import main
from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.problem import (
    FeatureSource,
    SecondMoments,
    objective,
    second_moments,
)
from kancompile.passes.rounding_methods.uniform import Uniform
from kancompile.processes import dealt, sum_over_chunks
from tests.passes.rounding_methods.rounding_problems import generator, problem, table_codes
from tests.process_threads import together

ROOT = Path(__file__).parent.parent
COUNTS = (1, 2, 3)


def chunks() -> list[Tensor]:
    """Draw terms of very different sizes, whose sum depends on the order in which it is taken."""
    draw = torch.Generator().manual_seed(0)
    return [10.0 ** (number % 5 * 4) * torch.randn(6, generator=draw) for number in range(11)]


@pytest.mark.parametrize("count", COUNTS)
def test_a_sum_is_that_of_python_in_the_order_of_chunks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [0.0] * 6
    for chunk in chunks():  # doubles of Python are added one by one
        expected = [total + float(one) for total, one in zip(expected, chunk, strict=True)]
    found = together(lambda: sum_over_chunks(iter(chunks()), lambda chunk: (chunk,)), count, monkeypatch)
    assert [one[0].tolist() for one in found] == [expected] * count  # type: ignore[index]
    exact = [float(sum(Fraction(float(chunk[column])) for chunk in chunks())) for column in range(6)]
    assert np.allclose(expected, exact, rtol=1e-12)
    assert [math.fsum(float(chunk[column]) for chunk in reversed(chunks())) for column in range(6)] == exact


@pytest.mark.parametrize("count", COUNTS)
def test_each_item_is_done_once_and_reaches_all_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def work(number: int) -> tuple[Tensor, ...]:
        done.append(number)
        inner = list(dealt([number], lambda one: (torch.tensor(one),)))  # shares nothing out
        return inner[0][0] * 2, torch.tensor([True, False]), torch.tensor([number], dtype=torch.uint8)

    found = together(lambda: [one[0].item() for one in dealt(range(7), work)], count, monkeypatch)
    assert found == [[2 * number for number in range(7)]] * count
    assert sorted(done) == list(range(7))


def test_all_raise_what_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(number: int) -> tuple[Tensor, ...]:
        if number == 3:
            raise KanCompileError("chunk 3: found NaN")
        return (torch.zeros(1),)

    found = together(lambda: list(dealt(range(5), work)), 2, monkeypatch)
    assert [(type(one), str(one)) for one in found] == [(KanCompileError, "chunk 3: found NaN")] * 2
    with pytest.raises(KanCompileError, match="found 0 chunks"):
        sum_over_chunks([], lambda chunk: (chunk,))


def test_covariances_have_equal_bits_in_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    features = FeatureSource.from_tensor(table_codes(700, 600, 3, dead=5), 96)  # three strips
    alone = second_moments(features, "l")
    for count in COUNTS[1:]:
        for found in together(lambda: second_moments(features, "l"), count, monkeypatch):
            assert isinstance(found, SecondMoments)
            assert torch.equal(found.covariance, alone.covariance)
            assert torch.equal(found.mean, alone.mean)
            assert torch.equal(found.variance, alone.variance)


def test_a_layer_is_rounded_and_measured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> tuple[list[int], float]:
        task = problem(bits=4, n=700)
        rounded = Uniform()(task, generator())
        return rounded.codes.flatten().tolist(), objective(task, rounded)

    assert together(work, 2, monkeypatch) == [work()] * 2


def test_a_process_alone_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined() as team, team.together():
        team.check_equal(b"file")
        assert team.writes
        assert team.speaks()


def test_files_that_differ_are_refused_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        here, count = processes._place.get()
        processes.Team(here, count).check_equal(b"same", b"other" if here else b"")

    for error in together(work, 2, monkeypatch):
        assert isinstance(error, KanCompileError)
        assert "found another file in process 1 than in process 0" in str(error)


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert main(["recipe"]) == 2
    assert "recipe: found 2 processes that torchrun started, expected one" in capsys.readouterr().err


NETS = """
import os, signal
import torch
from torch import nn
from examples.zoo import chebyshev_kan, efficient_kan, kagn_conv
from kancompile.errors import KanCompileError

def layers():
    torch.manual_seed(0)
    return efficient_kan.build((8, 24, 3), grid_size=3).eval()

def convolutions():
    torch.manual_seed(0)
    return kagn_conv.build((1, 6, 8), (1, 2), 3).eval()

class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.halves = nn.ModuleList(chebyshev_kan.build((4, 9), seed=number) for number in range(2))
        self.last = chebyshev_kan.build((18, 3))

    def forward(self, x):
        left, right = x.chunk(2, 1)
        return self.last(torch.cat([self.halves[0](left), self.halves[1](right)], 1))

def side_by_side():
    torch.manual_seed(0)
    return Halves().eval()

def fails():
    if os.environ.get("RANK") == "1":
        raise KanCompileError("only process 1 fails")
    return layers()
"""
TOGETHER = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    draw = np.random.default_rng(1)
    (tmp_path / "nets.py").write_text(NETS)
    np.savez(tmp_path / "layers.npz", x=draw.standard_normal((1400, 8)).astype("f4"))
    np.savez(tmp_path / "convolutions.npz", x=draw.standard_normal((200, 1, 8, 8)).astype("f4"))
    return tmp_path


def started(
    folder: Path, launcher: tuple[str, ...], net: str, data: str, out: str, *options: str
) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "kancompile", "compile", f"nets:{net}", "--calibration", f"{data}.npz"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--weight-bits", "4", "--no-timing", "--json", "--out", out, *options],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "method"),
    [
        *((net, method) for net in ("layers", "convolutions") for method in ("uniform", "gptq")),
        *(("side_by_side", method) for method in ("gptq", "adaround", "awq+gptq", "brecq", "hawq-v2")),
    ],
)
def test_two_processes_write_the_files_of_one(net: str, method: str, nets: Path) -> None:
    for launcher, out in (((), "one"), (TOGETHER, "two")):
        data = "convolutions" if net == "convolutions" else "layers"
        process = started(nets, launcher, net, data, out, "--method", method)
        said, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        assert json.loads(said)["passed"]  # one of them has printed
    for name in ("model.onnx", "model.manifest.json"):
        assert (nets / "one" / name).read_bytes() == (nets / "two" / name).read_bytes()
    assert sorted(path.name for path in (nets / "two").iterdir()) == ["model.manifest.json", "model.onnx"]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_one_message(nets: Path) -> None:
    process = started(nets, TOGETHER, "fails", "layers", "out")
    said, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "kancompile: error: only process 1 fails" in errors
    assert errors.count("kancompile: ") == 1
    assert not said
    assert not (nets / "out").exists()


@pytest.mark.slow
def test_an_interruption_ends_all(nets: Path) -> None:
    process = started(nets, TOGETHER, "layers", "layers", "out")
    time.sleep(20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("kancompile: ") <= 1  # torchrun may be quicker
    assert not (nets / "out").exists()
