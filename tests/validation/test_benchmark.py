"""The benchmark: candidates in turns, honest about what could not run, leaving everything as it found it."""

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes.machine import available_cores, describe_machine
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import (
    COMPILED,
    EAGER,
    FLOAT_EXPORT,
    Benchmark,
    Timing,
    benchmark,
    take_turns,
)
from kancompile.validation.float_export import export_float


class Net(nn.Module):
    """Exports well; its second mode does not export at all."""

    def __init__(self, has_choice: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.has_choice = has_choice
        self.seen: set[tuple[int, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            self.seen.add((len(x), torch.get_num_threads()))
        if self.has_choice and x.sum() > 1e9:
            return x
        return self.linear(x)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture(scope="module")
def net_file(net: Net) -> bytes:
    return export_float(net, (4,))


def test_the_float_export_computes_the_model_at_any_batch(net: Net, net_file: bytes) -> None:
    for n in (1, 2, 9):
        x = torch.rand(n, 4, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(RuntimeModel(net_file)(x), net(x).detach(), rtol=1e-6, atol=1e-6)


def test_every_candidate_is_measured_in_every_setting_and_nothing_stays_changed(net: Net, net_file: bytes) -> None:
    threads = torch.get_num_threads()
    net.seen.clear()
    result = benchmark(net_file, net, batch_sizes=(1, 8), threads=(1, 0), repeats=3, warmup=1)
    cells = {(t.candidate, t.batch_size, t.threads) for t in result.timings}
    assert cells == {(c, b, t) for c in (COMPILED, FLOAT_EXPORT, EAGER) for b in (1, 8) for t in (1, 0)}
    assert all(0 < t.p10 <= t.median <= t.p90 <= t.p99 for t in result.timings)
    assert all(t.blocks == 3 for t in result.timings)
    assert result.unavailable == {}
    assert {(1, 1), (8, 1), (1, available_cores()), (8, available_cores())} <= net.seen
    assert torch.get_num_threads() == threads
    assert net.training
    assert result.ratio(COMPILED, 8, 1) == 1
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(plain["timings"]) == len(cells)
    assert result.table().count(EAGER) == 4


def test_a_model_that_cannot_be_exported_is_listed_with_the_reason(net_file: bytes) -> None:
    result = benchmark(net_file, Net(has_choice=True), batch_sizes=(2,), threads=(1,), repeats=3, warmup=1)
    assert {t.candidate for t in result.timings} == {COMPILED, EAGER}
    assert FLOAT_EXPORT in result.unavailable
    assert f"{FLOAT_EXPORT}: not measured" in result.table()


def test_a_model_that_fails_in_pytorch_is_listed_too(net_file: bytes) -> None:
    result = benchmark(net_file, nn.Linear(5, 3), batch_sizes=(2,), threads=(1,), repeats=3, warmup=1)
    assert [t.candidate for t in result.timings] == [COMPILED]
    assert set(result.unavailable) == {FLOAT_EXPORT, EAGER}


def test_candidates_take_turns_and_slow_ones_look_slow() -> None:
    order: list[str] = []

    def candidate(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    names = {"a": 0.06, "b": 0.15, "c": 0.06}
    timings = take_turns({name: candidate(name, s) for name, s in names.items()}, 1, 1, 6, 1, {})
    measured = order[-18:]  # one call each is longer than a block
    assert all(Counter(measured[i : i + 3]) == Counter("abc") for i in range(0, 18, 3))
    assert {measured[i] for i in range(0, 18, 3)} == {"a", "b", "c"}  # nobody is always first
    by_name = {t.candidate: t for t in timings}
    assert by_name["b"].median >= 0.15
    assert by_name["a"].median >= 0.06
    assert all(t.calls_per_block == 1 for t in timings)


def test_percentiles_and_ratios() -> None:
    timings = (Timing(COMPILED, 1, 1, 2e-5, 1e-5, 3e-5, 4e-5, 5, 9), Timing(EAGER, 1, 1, 1e-3, 9e-4, 2e-3, 3e-3, 5, 9))
    result = Benchmark("m", timings, {}, {"cpu": "x"})
    assert result.ratio(EAGER, 1, 1) == pytest.approx(50)
    assert "20.0 us" in result.table()
    assert "1.00 ms" in result.table()
    assert "50.00x" in result.table()


def test_given_data_is_used(net_file: bytes) -> None:
    kept: list[Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(x)
            return x[:, :3]

    data = torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    benchmark(net_file, Keeps(), batch_sizes=(5,), threads=(1,), repeats=3, warmup=1, data=data)
    assert torch.equal(kept[-1], data[[0, 1, 2, 0, 1]])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_sizes": ()}, "batch_sizes is"),
        ({"batch_sizes": (0,)}, r"batch_sizes is \[0\], expected at least 1"),
        ({"threads": (-1,)}, "threads is"),
        ({"repeats": 2}, "repeats is"),
        ({"warmup": 0}, "warmup is"),
        ({"data": torch.zeros(2, 5)}, r"found samples of shape \(5,\), expected \(4,\)"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], text: str, net: Net, net_file: bytes) -> None:
    with pytest.raises(KanCompileError, match=text):
        benchmark(net_file, net, **options)


def test_unreadable_files_are_refused(net: Net) -> None:
    with pytest.raises(KanCompileError, match="cannot be read"):
        benchmark("absent.onnx", net)


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert {"torch", "onnxruntime", "python", "system"} <= set(machine)
