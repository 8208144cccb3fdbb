"""NaN and infinity as inputs: the simulation, ONNX Runtime and C answer alike, and the documentation says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IndexQuantizer, Input, Interface, NamedTensors, Program
from kancompile.passes.guard_nan import GuardNaN
from kancompile.runtimes import c99
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.c99 import emit as emit_c
from kancompile.targets.onnx.export import emit
from tests.runtimes.exactness import PROGRAMS, onnxruntime_outputs

SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, -0.0)


def broken_inputs(program: Program, n: int = 90) -> np.ndarray:
    """A sample of NaN alone, and samples of which a third of the values are no numbers or at the edge of being some."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (n, *program.input_shape)).astype(np.float32)
    replaced = rng.random(x.shape) < 0.3
    x[replaced] = rng.choice(np.array(SPECIAL, np.float32), int(replaced.sum()))
    x[0] = np.nan
    return x


@pytest.mark.parametrize("levels", [2, 17, 256, 257, 4096])
@pytest.mark.parametrize("count", [1, 3, 8, 37])  # whole vectors and what is left over
def test_nan_is_the_first_row_and_infinities_are_the_outermost(levels: int, count: int) -> None:
    index = IndexQuantizer(0.1, levels // 2, levels)
    assert index(torch.full((count,), torch.nan)).tolist() == [0] * count
    assert index(torch.full((count,), torch.inf)).tolist() == [levels - 1] * count
    assert index(torch.full((count,), -torch.inf)).tolist() == [0] * count


@pytest.mark.needs("c99")
@pytest.mark.parametrize("case", PROGRAMS)
def test_the_simulation_equals_onnx_runtime_and_c(case: str, tmp_path: Path) -> None:
    program = PROGRAMS[case]()
    x = broken_inputs(program)
    expected = program(torch.from_numpy(x)).numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(onnxruntime_outputs(emit(program, {}), x), expected)
    if c99.missing() is not None:
        pytest.skip(str(c99.missing()))
    (tmp_path / "model.c").write_bytes(emit_c(program, {}))
    with c99.prepare(tmp_path / "model.c", 1) as prepared:
        np.testing.assert_array_equal(prepared.run(x).reshape(expected.shape), expected)


def test_nan_is_read_as_the_lowest_input() -> None:
    program = PROGRAMS["MLP W8, values handed over"]()
    x = broken_inputs(program)
    lowest = np.nan_to_num(x, nan=-3e38)
    np.testing.assert_array_equal(program(torch.from_numpy(x)).numpy(), program(torch.from_numpy(lowest)).numpy())


class Normalised(nn.Module):
    """NaN reaches the second layer through float arithmetic between the layers."""

    def __init__(self) -> None:
        super().__init__()
        first, second = KAN([3, 4, 2], torch.Generator().manual_seed(5)).layers
        self.layers = nn.Sequential(first, nn.LayerNorm(4), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


CALIBRATION = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("recipe", "is_integer"),
    [
        ({}, True),
        ({"layers": {"layers.0": {"precision": "float"}}}, False),
        ({"layers": {"layers.0": {"lowering": "keep"}}}, True),
        ({"precision": "int16"}, False),
        ({"precision": "float"}, False),
    ],
    ids=["int8", "float, then int8", "as PyTorch computes it, then int8", "int16", "float"],
)
def test_every_precision_answers_as_the_file_does(recipe: dict, is_integer: bool) -> None:
    compiled = kancompile.compile(Normalised(), CALIBRATION, recipe=recipe)
    session = RuntimeModel(compiled.model_bytes)
    refused = 0
    samples = [*broken_inputs(compiled.program, 20), *([[value, 0.0, 0.0] for value in SPECIAL])]
    for sample in np.array(samples, np.float32)[:, None]:
        x = torch.from_numpy(sample)
        try:
            found = session(x).numpy()
        except KanCompileError:
            with pytest.raises(KanCompileError, match=r"found NaN among the inputs of a layer.*check inputs"):
                compiled.program(x)
            refused += 1
            continue
        simulated = compiled.program(x).numpy()
        np.testing.assert_allclose(found, simulated, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert not is_integer or np.isfinite(simulated).all()
    assert (refused > 0) is not is_integer


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        pytest.param({"precision": "int16"}, marks=pytest.mark.slow),
        {"layers": {"layers.0": {"precision": "float"}}},
    ],
    ids=["int8", "int16", "float, then int8"],
)
def test_a_guard_lets_nan_through_and_changes_nothing_else(recipe: dict) -> None:
    guarded = kancompile.compile(Normalised(), CALIBRATION, recipe={**recipe, "goal_sqnr": None, "guard_nan": "on"})
    x = CALIBRATION[:40].copy()
    has_nan = np.random.default_rng(1).random(len(x)) < 0.4
    x[has_nan, np.arange(40)[has_nan] % 3] = np.nan
    x[0], has_nan[0] = np.nan, True
    session = RuntimeModel(guarded.model_bytes)
    for rows in (x, x[:1], x[1:2]):
        found, simulated = session(torch.from_numpy(rows)).numpy(), guarded.program(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(found, simulated, rtol=1e-5, atol=1e-6, equal_nan=True)
    found = session(torch.from_numpy(x)).numpy()
    assert np.isnan(found[has_nan]).all()
    unguarded = guarded.lowered(torch.from_numpy(np.nan_to_num(x))).numpy()
    np.testing.assert_allclose(found[~has_nan], unguarded[~has_nan], rtol=1e-5, atol=1e-6)
    assert guarded.program.layers() == guarded.lowered.layers()
    assert recipe or all(row.is_integer for row in guarded.audit.rows)
    with pytest.raises(KanCompileError, match="target 'c99': guard_nan is 'on', expected 'off'"):
        guarded.for_target("c99")


def test_a_guard_of_several_inputs_and_outputs_keeps_the_contract_of_a_pass() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = torch.sin(x).sum(1) + t[:, 0] + ids[:, 0]
            return y, torch.stack([y, -y], dim=1).unsqueeze(1), y > 0

    graph = fx.symbolic_trace(Two())
    interface = Interface((Input("x", (3,)), Input("ids", (1,), torch.int64), Input("t", (2,))), ("a", "b", "c"))
    program = Program(graph, (3,), declared=interface)
    guarded = GuardNaN()(program)
    assert GuardNaN()(guarded) is guarded
    x = torch.ones(4, 3)
    x[1, 2] = torch.nan
    t = torch.ones(4, 2)
    t[2, 1] = torch.nan  # which no output depends on
    values = NamedTensors({"x": x, "ids": torch.ones(4, 1, dtype=torch.int64), "t": t})
    assert not torch.isnan(program(values[torch.tensor([0, 3])]).tensors["a"]).any()
    found = guarded(values).tensors
    assert torch.isnan(found["a"]).tolist() == [False, True, True, False]
    assert torch.isnan(found["b"]).all((1, 2)).tolist() == [False, True, True, False]
    assert found["c"].tolist() == [True, True, True, True]
