"""Dynamic dimensions beside the batch: one file for sequences of every length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

import kancompile
import kancompile.data
from kancompile.data import load_calibration, read_dynamic
from kancompile.errors import KanCompileError
from tests.interfaces import Rbf, Tokens

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, (100, 12))
X = RNG.standard_normal((100, 12, 6)).astype(np.float32)


class Series(nn.Module):
    """Layers over tokens, a mean over time, a layer over samples; a mask of the same length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = Rbf(6, 8), Rbf(8, 4), Rbf(4, 3)
        self.norm = nn.LayerNorm(8)
        self.eval()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.b(self.norm(self.a(x))) * mask.unsqueeze(-1)
        return self.head(tokens.mean(1)), tokens


class Attention(nn.Module):
    """Embeds tokens and at most 32 positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(20, 8), nn.Parameter(0.1 * torch.randn(32, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.a, self.b = Rbf(8, 8), Rbf(8, 20)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.b(x + self.a(self.norms[1](x)))


class Fixed(nn.Module):
    """Knows the length of its sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Rbf(6, 8), Rbf(96, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(-1, 96))


def shapes_of(compiled: kancompile.CompiledModel) -> tuple[list[Any], list[Any]]:
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    return [value.shape for value in session.get_inputs()], [value.shape for value in session.get_outputs()]


def error_db(found: Any, expected: Tensor) -> float:
    noise = float((torch.from_numpy(found) - expected).square().mean())
    return 10 * float(np.log10(float(expected.var()) / noise))


def test_several_inputs_share_a_length() -> None:
    mask = RNG.random((100, 12)) > 0.2
    data = {"x": X, "mask": mask}
    compiled = kancompile.compile(Series(), data, dynamic=["x: batch, time, 6", "mask: batch, time"])
    assert shapes_of(compiled) == (
        [["batch", "time", 6], ["batch", "time"]],
        [["batch", 3], ["batch", "time", 4]],
    )
    assert [layer.name for layer in compiled.program.layers()] == ["a", "b", "head"]
    assert not any(compiled.program.is_float(layer) for layer in compiled.program.layers())
    for length in (12, 7):
        part = {name: value[:, :length] for name, value in data.items()}
        result = compiled.validate(part)
        assert result.runtime is not None
        assert result.runtime.differing == 0
        assert result.compiled.parts["output_1"].sqnr_db > 25


def test_tokens_of_any_length() -> None:
    compiled = kancompile.compile(Tokens(), IDS, dynamic={1: torch.export.Dim("time")})
    assert shapes_of(compiled) == ([["batch", "time"]], [["batch", "time", 20]])
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    for ids in (IDS[:5, :4], np.tile(IDS[:5], (1, 3))):
        with torch.no_grad():
            expected = Tokens()(torch.from_numpy(ids))
        assert error_db(session.run(None, {"input": ids})[0], expected) > 20


class Between(nn.Module):
    """Two layers, and something that mixes the steps of a sequence between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = Rbf(6, 8), Rbf(8, 3), between
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.mean(1),
        lambda y: torch.sin(y).mean(1),
        lambda y: y.sum(1) / y.shape[1],
        lambda y: y.amax(1),
        lambda y: y[:, -1],
        lambda y: y - y.mean(1, keepdim=True),
        lambda y: y.flip(1),
        lambda y: y.cumsum(1) / y.shape[1],
        lambda y: torch.cat([y[:, :1], y], 1),
        lambda y: y[:, :1].expand(-1, y.shape[1], -1) * 1.0,
    ],
)
def test_steps_of_any_number_may_be_mixed_between_layers(between: Callable[[Tensor], Tensor]) -> None:
    model = Between(between)
    compiled = kancompile.compile(model, X, dynamic="batch, time, 6", recipe={"goal_sqnr": None})
    assert {"a", "b"} <= {layer.name for layer in compiled.program.layers()}
    assert not any(compiled.program.is_float(layer) for layer in compiled.program.layers())
    for length in (12, 5):
        x = X[:40, :length]
        torch.testing.assert_close(compiled.captured(torch.from_numpy(x)), model(torch.from_numpy(x)).detach())
        result = compiled.validate(x)
        assert result.compiled.sqnr_db > 15  # fewer steps have means farther apart
        assert result.runtime is not None
        assert result.runtime.differing == 0


@pytest.mark.slow
def test_the_model_says_how_long_its_sequences_may_be() -> None:
    compiled = kancompile.compile(Attention(), IDS, dynamic="batch, time")
    assert {"a", "b"} <= {layer.name for layer in compiled.program.layers()} - set(compiled.program.kinds)
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    ids = np.tile(IDS[:5], (1, 2))
    with torch.no_grad():
        expected = Attention()(torch.from_numpy(ids))
    assert error_db(session.run(None, {"input": ids})[0], expected) > 20


def test_a_length_that_the_model_knows_is_refused() -> None:
    with pytest.raises(
        KanCompileError, match=r"test_dynamic_sizes.py:\d+: found code that needs a fixed size where time should be"
    ):
        kancompile.compile(Fixed(), X, dynamic="batch, time, 6")


def test_a_dimension_that_the_model_specializes_is_refused() -> None:
    class Unrolled(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            return sum((self.a(x[:, step]) for step in range(int(x.shape[1]))), torch.zeros(()))

    with pytest.raises(
        KanCompileError, match=r"'Unrolled': .*found code that needs a fixed size where time should be dynamic"
    ):
        kancompile.compile(Unrolled(), X, dynamic="batch, time, 6")


def test_target_of_fixed_shapes_says_so() -> None:
    with pytest.raises(KanCompileError, match=r"target 'c99': found the inputs input \[batch, time\] int64"):
        kancompile.compile(Tokens(), IDS, dynamic="batch, time", target="c99")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("x: batch, time, 6", {"x": {1: "time"}}),
        ("x: _, time, _; m: batch, time", {"x": {1: "time"}, "m": {1: "time"}}),
        (["m: batch, n"], {"m": {1: "n"}}),
        ({"x": {2: "n"}}, {"x": {2: "n"}}),
        ({"x": {0: torch.export.Dim("batch")}}, {}),
    ],
)
def test_forms(given: Any, found: dict[str, dict[int, str]]) -> None:
    samples = load_calibration({"x": X, "m": X[..., 0]}, model=kancompile.data.ModelInputs(("x", "m")))
    assert read_dynamic(given, samples) == found


def test_an_only_input_may_be_called_as_the_model_calls_it() -> None:
    samples = load_calibration(X)
    for given in ("x: batch, time, 6", "batch, time, 6", {"x": {1: "time"}}, {1: "time"}):
        assert read_dynamic(given, samples) == {"input": {1: "time"}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("y: batch, time, 6", r"found input 'y', expected one of \['x', 'm'\]"),
        ("x: batch, time", "found 'batch, time' for 'x', expected 3 sizes as the samples have"),
        ("x: batch, time, 7", "expected 3 sizes"),
        ("x: time, 12, 6", "expected a name such as time"),
        ({"x": {5: "n"}}, "for dimension 5 of 'x'"),
        ("x: batch, n, n", "'n' of size 12 in 'x' and 6 in 'x'"),
    ],
)
def test_wrong_forms(given: Any, words: str) -> None:
    samples = load_calibration({"x": X, "m": X[..., 0]}, model=kancompile.data.ModelInputs(("x", "m")))
    with pytest.raises(KanCompileError, match=words):
        read_dynamic(given, samples)


@pytest.mark.slow
def test_what_can_be_open_is_found() -> None:
    mask = RNG.random((100, 12)) > 0.2
    compiled = kancompile.compile(Series(), {"x": X, "mask": mask}, dynamic="auto")
    assert shapes_of(compiled)[0] == [["batch", "x_1", 6], ["batch", "x_1"]]
    assert "dynamic: takes x [batch, x_1, 6], mask [batch, x_1]" in compiled.manifest["notes"]


def test_nothing_is_opened_that_loses_a_layer() -> None:
    compiled = kancompile.compile(Fixed(), X, dynamic="auto")
    assert shapes_of(compiled)[0] == [["batch", 12, 6]]
    assert any(note.startswith("dynamic: no size") for note in compiled.manifest["notes"])
