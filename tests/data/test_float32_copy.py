"""Models in another precision, in a process whose new tensors have another one, and with a `train` of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.cli import main
from kancompile.data import evaluating, evaluation_mode, in_float32, load_model, precision_note
from kancompile.errors import KanCompileError
from kancompile.validation import FloatExport

N_IN, N_OUT = 4, 3


class Kan(nn.Module):
    """Matrix products, which refuse two types, and centers made when it runs, of the type that new tensors have."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(N_OUT, N_IN, 6, generator=draw, dtype=torch.float32))
        self.register_buffer("scale", torch.full((N_IN,), 0.9))
        self.shifts = [torch.zeros(N_IN)]

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-8 * ((x * self.scale + self.shifts[0])[..., None] - torch.linspace(-1, 1, 6)) ** 2)
        return nn.functional.linear(nn.functional.silu(x), self.weight[:, :, 0]) + torch.einsum(
            "bik,oik->bo", bumps, self.weight
        )


class Trainer(Kan):
    """Has methods of the names of nn.Module's, as pykan 0.0 has."""

    def train(self, dataset: Any, steps: int = 100) -> Any:  # type: ignore[override]
        return dataset["train_input"]

    def eval(self) -> Any:
        raise AssertionError("called")


@contextmanager
def default_dtype(kind: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def samples(n: int = 200) -> Tensor:
    return torch.rand(n, N_IN, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 - 1


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_a_float32_copy_is_compiled_and_the_model_stays(kind: torch.dtype) -> None:
    model, x = Kan().to(kind).train(), samples()
    rounded = copy.deepcopy(model).float().eval()
    with default_dtype(torch.float64):
        compiled = kancompile.compile(model, x.double().numpy())
        assert torch.get_default_dtype() == torch.float64
        result = compiled.validate(x.double())
        alone = kancompile.validate(compiled.model_bytes, model, x)
        assert compiled.beside_float(timing=False).float_bytes is not None
    kind_name = str(kind).removeprefix("torch.")
    said = f"model: holds {kind_name} values; a float32 copy of it was compiled, with which everything is compared"
    assert said in compiled.manifest["notes"]
    assert result.passed
    assert alone.compiled.sqnr_db == result.compiled.sqnr_db
    assert model.weight.dtype == model.scale.dtype == kind
    assert all(module.training for module in model.modules())
    assert kancompile.compile(rounded, x).model_bytes == compiled.model_bytes
    assert not any(note.startswith("model:") for note in kancompile.compile(rounded, x).manifest["notes"])


def test_the_copy_keeps_ties_and_graphs_of_gradients_out() -> None:
    model = Kan().double()
    model.tied = model.weight  # type: ignore[assignment]
    model.cache = {"last": [model(samples().double()), model.scale]}  # type: ignore[assignment]
    made = in_float32(model, (N_IN,))
    assert made is not model
    assert made.tied is made.weight
    assert made.cache["last"][0].dtype == torch.float32
    assert made.cache["last"][1] is made.scale
    assert made.shifts[0].dtype == torch.float32
    assert in_float32(made, (N_IN,)) is made
    assert precision_note(made, made) == ()


def test_a_buffer_in_float64_is_copied_where_it_drags_the_outputs_along() -> None:
    model = Kan()
    model.scale = model.scale.double()
    assert in_float32(model, samples()) is not model
    assert kancompile.compile(model, samples()).validate(samples()).passed
    model = Kan()
    model.register_buffer("count", torch.tensor(3.0, dtype=torch.float64))
    assert in_float32(model, samples()) is model


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = Kan().double()
    model.batches = iter(x for x in [1])  # type: ignore[assignment]
    with pytest.raises(KanCompileError, match=r"model 'Kan': found 'weight' of torch.float64.* cannot be copied"):
        kancompile.compile(model, samples())


def test_methods_named_train_and_eval_are_not_called() -> None:
    model = Trainer()
    model.child = nn.Dropout()
    model.training = False
    with evaluating(model), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [False, True]
    compiled = kancompile.compile(model, samples())
    assert compiled.validate(samples()).passed
    assert compiled.beside_float().float_bytes is not None
    assert kancompile.benchmark(compiled.model_bytes, model, (1,), (1,), repeats=3).timings
    FloatExport(model, (N_IN,)).close()
    assert [module.training for module in model.modules()] == [False, True]


NETS = """
import torch
torch.set_default_dtype(torch.float64)
from tests.data.test_float32_copy import Trainer
def make():
    return Trainer().double()
"""


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_the_command_line_takes_such_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    np.save(tmp_path / "x.npy", samples().double().numpy())
    spec, x, out = f"{tmp_path / 'nets.py'}:make", str(tmp_path / "x.npy"), tmp_path / "out"
    assert main(["compile", spec, "--calibration", x, "--out", str(out), "--report", "--quiet"]) == 0
    assert main(["compile", spec, "--calibration", x, "--out", str(out), "--force", "--no-timing"]) == 0
    assert "note: model: holds float64 values; a float32 copy" in capsys.readouterr().out
    assert "a float32 copy of it was compiled" in (out / "model.report.html").read_text()
    assert main(["validate", str(out / "model.onnx"), "--against", spec, "--data", x, "--quiet"]) == 0
    assert torch.get_default_dtype() == torch.float32
    assert not load_model(spec).training


class Faulty(Kan):
    """Raises what no other samples would mend."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "type":
            return super().forward(x) @ torch.eye(N_OUT, dtype=torch.float64)
        if self.fault == "module":
            import a_module_that_is_not_there  # type: ignore[import-not-found]  # noqa: F401
        return super().forward(x)[None]["a"]  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "type",
            r"raises RuntimeError in test_float32_copy.py:\d+ .*expected float32 throughout; the samples are not the cause",
        ),
        ("module", r"raises ModuleNotFoundError .*the samples are not the cause"),
        (
            "code",
            r"raises \w+Error in test_float32_copy.py:\d+ .*on every other shape that was tried, expected one that",
        ),
    ],
)
def test_samples_are_not_blamed_for_what_the_model_does(fault: str, said: str) -> None:
    with pytest.raises(KanCompileError, match=rf"^model 'Faulty': {said}"):
        kancompile.compile(Faulty(fault), samples())


def test_a_factory_that_lacks_a_package_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("def make():\n    import a_module_that_is_not_there\n")
    with pytest.raises(
        KanCompileError, match=r"the factory imports 'a_module_that_is_not_there', which is not installed"
    ):
        load_model(f"{tmp_path / 'nets.py'}:make")
