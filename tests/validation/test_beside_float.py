"""The float export that a file is set beside: made once, within a limit, in a process of its own; and what is said of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kancompile.errors import KanCompileError
from kancompile.reporting.facts import worse_than_float
from kancompile.validation.benchmark import EAGER, FLOAT_EXPORT
from kancompile.validation.beside_float import BatchTime, BesideFloat
from kancompile.validation.float_export import FloatExport, export_float
from tests.compiled_kan import compiled_kan, make_inputs, make_model


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(30)
        return x


class Unexportable(nn.Module):
    """ONNX has no such operator."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + torch.linalg.qr(x)[0].sum()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_an_export_is_made_once_and_again_for_other_weights() -> None:
    model = make_model()
    content = FloatExport(model, (6,)).result()
    assert content == export_float(make_model(), (6,))
    again = FloatExport(model, (6,))
    assert again._process is None  # nothing is exported again
    assert again.result() == content
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert FloatExport(model, (6,)).result() != content


def test_an_export_has_a_limit_and_leaves_the_mode_of_the_model() -> None:
    model = Slow().train()
    start = time.monotonic()
    with pytest.raises(KanCompileError, match=r"did not end within 0\.5 seconds"):
        FloatExport(model, (6,), seconds=0.5).result()
    assert time.monotonic() - start < 10
    assert model.training


@pytest.mark.slow
def test_bytes_and_times_are_those_of_both_files() -> None:
    compiled = compiled_kan()
    beside = compiled.beside_float()
    assert beside.float_bytes == len(export_float(make_model(), (6,)))
    assert beside.compiled_bytes == len(compiled.model_bytes)
    assert beside.timed == FLOAT_EXPORT
    assert [time.batch for time in beside.times] == [1, 64]
    assert all(time.float_seconds > 0 and time.compiled_seconds > 0 for time in beside.times)
    assert beside.notes == ()
    assert compiled.beside_float(timing=False).times == ()


def test_where_there_is_no_export_the_file_is_set_beside_pytorch() -> None:
    compiled = replace(compiled_kan(), reference=Unexportable())
    beside = compiled.beside_float()
    assert beside.float_bytes is None
    assert beside.timed == EAGER
    assert len(beside.times) == 2
    assert "cannot be exported" in beside.notes[0]
    assert "compared with PyTorch" in beside.notes[0]


def _layer(name: str, bits: int, weights: int, table: int, levels: int = 256) -> dict[str, Any]:
    expansion = {"n_in": 4, "k": 9, "table_bytes": table, "levels": levels}
    return {"name": name, "weight_bits": bits, "weight_bytes": weights, "expansions": [expansion]}


@pytest.mark.parametrize(
    ("layer", "storage", "wanted"),
    [
        (_layer("a", 16, 60000, 40000), "smallest", "precision=int8"),
        (_layer("a", 8, 20000, 70000), "smallest", "levels=128"),
        (_layer("a", 8, 90000, 1000), "smallest", "--weight-bits 4"),
        (_layer("a", 8, 900, 100), "smallest", "gains nothing in bytes"),
    ],
)
def test_a_larger_file_has_its_cause_and_an_option(layer: dict[str, Any], storage: str, wanted: str) -> None:
    manifest = {"layers": [layer], "recipe": {"storage": storage}, "left_in_float": []}
    (text,) = worse_than_float(manifest, BesideFloat(50000, 100000, "", (), ()))
    assert text.startswith("the file is 2.0 times as large as the float export")
    assert wanted in text
    assert worse_than_float(manifest, BesideFloat(100000, 50000, "", (), ())) == []


def test_weights_that_both_files_have_are_no_cause() -> None:
    layer, left = _layer("a", 16, 2000, 50000), [{"operator": "lstm"}]
    manifest = {"layers": [layer], "recipe": {"storage": "smallest"}, "left_in_float": left}
    (text,) = worse_than_float(manifest, BesideFloat(190000, 210000, "", (), ()))
    assert "layer 'a' holds 52,000 bytes in more than 8 bits" in text


@pytest.mark.parametrize(
    ("layer", "storage", "wanted"),
    [
        (_layer("a", 16, 100, 100), "smallest", "precision=int8"),
        (_layer("a", 4, 100, 100), "smallest", "--storage fastest"),
        (_layer("a", 8, 100, 100), "smallest", "36 functions are looked up"),
    ],
)
def test_a_slower_file_has_its_cause_and_an_option(layer: dict[str, Any], storage: str, wanted: str) -> None:
    times = (BatchTime(1, 1e-5, 2e-5), BatchTime(64, 3e-4, 1e-4))
    manifest = {"layers": [layer], "recipe": {"storage": storage}}
    (text,) = worse_than_float(manifest, BesideFloat(None, 100, FLOAT_EXPORT, times, ()))
    assert "2.0 times as long at batch 1" in text
    assert "batch 64" not in text
    assert wanted in text


def test_compiling_leaves_the_mode_of_a_model() -> None:
    import kancompile

    model = make_model().train()
    kancompile.compile(model, make_inputs())
    assert model.training
    assert all(module.training for module in model.modules())
