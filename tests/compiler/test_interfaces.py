"""Networks of several inputs and outputs, and of integers: names, types and values from the data to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.errors import KanCompileError
from tests.interfaces import DataclassInput, DictInput, Diffusion, Sample, Tokens, Two, Unused

ROWS = 120
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, 4)).astype(np.float32)
T = RNG.standard_normal((ROWS, 8)).astype(np.float32)
STEPS = RNG.integers(0, 10, ROWS)
IDS = RNG.integers(0, 20, (ROWS, 6))
MASK = RNG.random((ROWS, 8)) > 0.3


def interface_of(compiled: kancompile.CompiledModel) -> tuple[dict[str, tuple[str, list[Any]]], list[str]]:
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    return inputs, [value.name for value in session.get_outputs()]


def check(compiled: kancompile.CompiledModel, data: Any, layers: int, least: float = 25.0) -> None:
    result = compiled.validate(data)
    assert result.runtime is not None
    assert result.runtime.differing == 0
    assert result.compiled.sqnr_db > least
    integer = [layer for layer in compiled.program.layers() if not compiled.program.is_float(layer)]
    assert len(integer) == layers


@pytest.mark.parametrize(
    "data",
    [
        {"t": T, "x": X},
        (X, T),
        [(X[:60], T[:60]), (X[60:], T[60:])],
        [{"x": X[:60], "t": T[:60]}, {"x": X[60:], "t": T[60:]}],
    ],
    ids=["mapping", "tuple", "loader of tuples", "loader of dicts"],
)
def test_two_inputs_in_every_form(data: Any) -> None:
    compiled = kancompile.compile(Two(), data)
    inputs, outputs = interface_of(compiled)
    assert inputs == {"x": ("tensor(float)", ["batch", 4]), "t": ("tensor(float)", ["batch", 8])}
    assert outputs == ["output"]
    check(compiled, {"x": X, "t": T}, 2)


def test_npz_by_names_with_labels(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with torch.no_grad():
        y = Two()(torch.from_numpy(X), torch.from_numpy(T)).numpy()
    np.savez(path, t=T, x=X, y=y)
    compiled = kancompile.compile(Two(), str(path))
    result = compiled.validate(str(path), max_drop=1.0)
    assert result.passed
    assert result.metrics["float"]["r2"] == pytest.approx(1)


def test_equal_data_give_equal_bytes_in_any_order() -> None:
    first, second = (kancompile.compile(Two(), data) for data in ({"x": X, "t": T}, {"t": T, "x": X}))
    assert first.model_bytes == second.model_bytes


def test_integers_and_outputs_by_name() -> None:
    compiled = kancompile.compile(Diffusion(), {"x": X, "t": STEPS})
    inputs, outputs = interface_of(compiled)
    assert inputs == {"x": ("tensor(float)", ["batch", 4]), "t": ("tensor(int64)", ["batch"])}
    assert outputs == ["noise", "hidden"]
    assert [entry["dtype"] for entry in compiled.manifest["inputs"]] == ["float32", "int64"]
    check(compiled, {"x": X, "t": STEPS}, 2)
    result = compiled.validate({"x": X, "t": STEPS})
    assert list(result.compiled.parts) == ["noise", "hidden"]
    assert result.compiled.worst is not None
    assert result.compiled.worst.called.startswith(("noise[", "hidden["))
    assert result.compiled.worst_db == pytest.approx(min(part.worst_db for part in result.compiled.parts.values()))


def test_optional_input_is_part_of_the_file_where_the_data_hold_it() -> None:
    compiled = kancompile.compile(Diffusion(), {"x": X, "t": STEPS, "mask": MASK})
    inputs, _ = interface_of(compiled)
    assert inputs["mask"] == ("tensor(bool)", ["batch", 8])
    check(compiled, {"x": X, "t": STEPS, "mask": MASK}, 2)


def test_unused_input_stays_an_input() -> None:
    compiled = kancompile.compile(Unused(), {"x": X, "t": T})
    assert list(interface_of(compiled)[0]) == ["x", "t"]
    check(compiled, {"x": X, "t": T}, 2)


@pytest.mark.parametrize("model", [DataclassInput(), DictInput()], ids=["dataclass", "dict"])
def test_one_argument_of_several_tensors(model: nn.Module) -> None:
    data = {"image": X, "ids": STEPS}
    compiled = kancompile.compile(model, data)
    assert list(interface_of(compiled)[0]) == ["image", "ids"]
    check(compiled, data, 2)
    ratio = compiled.beside_float(timing=False)
    assert ratio.float_bytes is not None


def test_tokens_stay_integers() -> None:
    compiled = kancompile.compile(Tokens(), IDS)
    inputs, _ = interface_of(compiled)
    assert inputs == {"input": ("tensor(int64)", ["batch", 6])}
    check(compiled, IDS, 2)


def test_tokens_as_whole_floats_are_never_drawn_at_random() -> None:
    class Cast(Tokens):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.long())

    compiled = kancompile.compile(Cast(), IDS.astype(np.float32))
    assert interface_of(compiled)[0] == {"input": ("tensor(float)", ["batch", 6])}
    check(compiled, IDS.astype(np.float32), 2)


def test_exported_program_of_several_inputs() -> None:
    batch = torch.export.Dim("batch")
    example = (torch.from_numpy(X[:3]), torch.from_numpy(STEPS[:3]))
    program = torch.export.export(Diffusion(), example, dynamic_shapes={"x": {0: batch}, "t": {0: batch}})
    compiled = kancompile.compile(program, {"x": X, "t": STEPS})
    assert interface_of(compiled)[0]["t"] == ("tensor(int64)", ["batch"])
    check(compiled, {"x": X, "t": STEPS}, 2)


@pytest.mark.slow
def test_diagnosis_of_several_inputs() -> None:
    found = kancompile.diagnose(Diffusion(), {"x": X, "t": STEPS})
    assert "a" in found.text()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"a": X, "t": STEPS}, r"found arrays \['a', 't'\], expected \['x', 't'\].*missing: \['x'\]"),
        ({"x": X, "t": STEPS[:9]}, "120 rows of 'x', 9 rows of 't'"),
        ({"x": X, "t": STEPS + 100}, r"IndexError.*numbers of the model's vocabulary; found 100 ... 109 in 't'"),
        (X, "expected an array for every input"),
        ((X, STEPS, STEPS, STEPS, STEPS), "found 5 parts, expected 2 inputs"),
    ],
)
def test_wrong_data_are_named(data: Any, words: str) -> None:
    with pytest.raises(KanCompileError, match=words):
        kancompile.compile(Diffusion(), data)


@pytest.mark.parametrize("target", ["c99", "litert"])
def test_targets_of_one_tensor_say_so(target: str) -> None:
    with pytest.raises(
        KanCompileError, match=rf"target '{target}': found the inputs x \[batch, 4\] float32, t \[batch\] int64"
    ):
        kancompile.compile(Diffusion(), {"x": X, "t": STEPS}, target=target)


def test_a_network_without_inputs_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(3)

    with pytest.raises(KanCompileError, match="no tensor input in forward"):
        kancompile.compile(Constant(), X)


def test_order_of_the_arguments_is_that_of_forward() -> None:
    """A dataclass is filled by its fields, whatever order the data have."""
    compiled = kancompile.compile(DataclassInput(), {"ids": STEPS, "image": X})
    x, ids = torch.from_numpy(X), torch.from_numpy(STEPS)
    with torch.no_grad():
        expected = DataclassInput()(Sample(x, ids))
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    found = session.run(None, {"image": X, "ids": STEPS})[0]
    assert float((torch.from_numpy(found) - expected).abs().max()) < 0.1 * float(expected.abs().max())
