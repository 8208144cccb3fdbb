"""Tracing: what is accepted, and what the refusals say."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend import capture
from kancompile.frontend.trace import export
from kancompile.frontend.trace.examples import Examples
from tests.frontend import odd_models
from tests.frontend.capturing import draw


class Doubled(nn.Module):
    """A model that is refused before anything is analysed, or traced as it is."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        for value in self.buffers():
            x = torch.minimum(x, value)
        return x * self.scale


class StaticBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(3, 4)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_batch_is_dynamic_and_flags_are_restored() -> None:
    model = odd_models.DegreeMajor().train()
    model.linear.eval()
    program = export(model, (4,))
    x = draw(11, 4)
    torch.testing.assert_close(program.module()(x), model(x))
    assert (model.training, model.linear.training) == (True, False)


def test_strict_tracing_is_tried_second() -> None:
    program = export(odd_models.ReinterpretingReshape(), (4,))  # len(x) specialises the batch when not strict
    assert program.module()(draw(7, 4)).shape == (7, 3)


def test_specialised_batch_is_refused() -> None:
    with pytest.raises(KanCompileError, match=r"'StaticBatch'.*dynamic batch"):
        export(StaticBatch(), (4,))


def test_static_program_is_refused() -> None:
    program = torch.export.export(odd_models.DegreeMajor(), (draw(3, 4),))
    with pytest.raises(KanCompileError, match=r"static input shape \(3, 4\).*dynamic_shapes"):
        export(program, (4,))


def test_number_of_inputs_and_outputs() -> None:
    with pytest.raises(KanCompileError, match=r"'TwoInputs': found forward\(x.*expected an array for every input"):
        export(TwoInputs(), (4,))
    assert len(export(TwoOutputs(), (4,)).graph_signature.user_outputs) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_parameter_is_named(value: float) -> None:
    model = odd_models.DegreeMajor()
    with torch.no_grad():
        model.linear.weight[1, 2] = value
    with pytest.raises(KanCompileError, match=r"parameter 'linear.weight': found 1 non-finite of 36 values"):
        export(model, (4,))


def test_nan_buffer_is_named_and_infinite_sentinel_is_legal() -> None:
    with pytest.raises(KanCompileError, match="buffer 'limit': found 4 non-finite"):
        export(Doubled(limit=torch.full((4,), float("nan"))), (4,))
    export(Doubled(limit=torch.full((4,), float("inf"))), (4,))


def test_infinite_output_is_refused() -> None:
    class Unbounded(odd_models.DegreeMajor):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("limit", torch.full((3,), float("inf")))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.limit

    with pytest.raises(KanCompileError, match=r"test_export.py:\d+: found NaN or infinite outputs"):
        capture(Unbounded(), (4,))


def test_double_precision_is_refused() -> None:
    with pytest.raises(KanCompileError, match=r"parameter 'linear.weight': found torch.float64, expected float32"):
        export(odd_models.DegreeMajor().double(), (4,))


def test_state_and_randomness_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"found writes to \['calls'\]"):
        export(Counting(), (4,))
    with pytest.raises(KanCompileError, match=r"test_export.py:\d+: found the random operator 'aten.rand"):
        capture(Noisy(), (4,))


@pytest.mark.parametrize("shape", [(), (0,), (4, -1), ("4",), (True,)])
def test_input_shape_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(KanCompileError, match="input_shape: found"):
        export(odd_models.DegreeMajor(), shape)


def test_example_is_checked() -> None:
    model = odd_models.DegreeMajor()
    for example in (draw(3, 4).double(), draw(4), draw(0, 4)):
        with pytest.raises(KanCompileError, match="example input: found"):
            export(model, example)
    with pytest.raises(KanCompileError, match="example input: found NaN"):
        export(model, torch.full((3, 4), float("nan")))
    program = torch.export.export(model, (draw(3, 4),), dynamic_shapes=({0: torch.export.Dim("b")},))
    with pytest.raises(KanCompileError, match=r"input shape.*expected \[batch, 5\]"):
        export(program, (5,))


def test_examples_are_samples_and_mixtures_of_them() -> None:
    own = draw(2, 4)
    rows = Examples.of(own).first(5)
    assert isinstance(rows, Tensor)
    assert torch.equal(rows[:2], own)
    assert torch.equal(rows, Examples.of(own).first(5))  # type: ignore[arg-type]
    assert rows.shape == (5, 4)
    nearest = (rows[2:, None] - own).abs().amin(1)
    assert float(nearest.max()) < 0.5 * float(own.std())


def test_whole_numbers_are_only_exchanged_within_their_element() -> None:
    tokens = torch.tensor([[0, 10], [1, 11], [2, 12]])
    generator = torch.Generator().manual_seed(0)
    for example in (tokens, tokens.float()):
        made = Examples.of(example).made(50, generator)
        assert isinstance(made, Tensor)
        assert made.dtype == example.dtype
        assert set(made[:, 0].tolist()) <= {0, 1, 2}
        assert set(made[:, 1].tolist()) <= {10, 11, 12}


def test_exported_program_and_file(tmp_path: Path) -> None:
    model = odd_models.DegreeMajor()
    program = torch.export.export(model, (draw(3, 4),), dynamic_shapes=({0: torch.export.Dim("b")},))
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    x = draw(6, 4)
    for given in (program, path, str(path)):
        torch.testing.assert_close(capture(given, (4,), trust=given is not program)(x), model(x))
    with pytest.raises(KanCompileError, match="origin is trusted"):
        capture(path, (4,))


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("nothing", b"")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(KanCompileError, match=r"model\.pt2"):
        export(path, (4,), trust=True)
    with pytest.raises(KanCompileError, match=r"found int"):
        export(3, (4,))  # type: ignore[arg-type]
