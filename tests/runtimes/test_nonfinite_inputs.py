"""NaN and infinity as inputs: the simulation, ONNX Runtime and C answer alike, and the documentation says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import IndexQuantizer, Program
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
