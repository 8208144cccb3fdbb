"""Networks of several inputs and outputs as users bring them: any number of arguments, own mappings, states, wrong data."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.cli.main import main
from kancompile.compiler import describe_interface
from kancompile.errors import KanCompileError
from kancompile.ir import Input, Interface
from kancompile.reporting.schema import report_schema
from tests.interfaces import DictInput, Diffusion, Rbf, Tokens, Two

ROWS = 120
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, 4)).astype(np.float32)
T = RNG.standard_normal((ROWS, 8)).astype(np.float32)
STEPS = RNG.integers(0, 10, ROWS)
IDS = RNG.integers(0, 20, (ROWS, 6))
CLASSES = RNG.integers(0, 3, ROWS)


class AnyNumber(Two):
    """Takes ``*inputs``."""

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*inputs)


class OneAndMore(Two):
    """Takes one input by name and others."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, rest[0])


class Named(Two):
    """Takes ``**batch``."""

    def forward(self, **batch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], batch["t"])


class Output(OrderedDict[str, Any]):
    """What Hugging Face models return is of such a kind."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Cell(nn.Module):
    """Returns the state under the name of the input that it becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_h, self.out = Rbf(4, 8), Rbf(8, 8), Rbf(8, 3)
        self.eval()

    def forward(self, x: Tensor, h: Tensor) -> Output:
        state = torch.tanh(self.of_x(x) + self.of_h(h))
        return Output(loss=None, y=self.out(state), h=state)


class Classifier(Tokens):
    """Computes a loss where labels are given, and returns it beside scores, as Hugging Face models do."""

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Output:  # type: ignore[override]
        hidden = self.embedding(input_ids)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1).to(hidden.dtype)
        scores = self.b(self.a(self.norm(hidden.mean(1))))
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return Output(loss=loss, logits=scores, hidden=hidden)


class Pair(NamedTuple):
    """Two tensors."""

    image: Tensor
    ids: Tensor


class Bundle(dict[str, Tensor]):
    """A mapping of its own class."""

    __getattr__ = dict.__getitem__


class TakesPair(DictInput):
    """Takes a named tuple."""

    def forward(self, batch: Pair) -> Tensor:  # type: ignore[override]
        return self.b(self.a(batch.image) + self.of_ids(batch.ids))


class TakesBundle(DictInput):
    """Takes a mapping of its own class."""

    def forward(self, batch: Bundle) -> Tensor:  # type: ignore[override]
        return self.b(self.a(batch.image) + self.of_ids(batch.ids))


class Joined(Diffusion):
    """Concatenates, which takes equal dimensions."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(torch.cat([x, self.steps(t)[..., :4]], 1))


def names(compiled: kancompile.CompiledModel) -> tuple[list[str], list[str]]:
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    return [value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()]


def check(compiled: kancompile.CompiledModel, data: Any) -> None:
    result = compiled.validate(data)
    assert result.runtime is not None
    assert result.runtime.largest < 1e-5
    assert result.compiled.sqnr_db > 25
    assert compiled.program.layers()


@pytest.mark.parametrize(
    ("model", "data", "inputs"),
    [
        (AnyNumber(), ((X, T), None), ["inputs.0", "inputs.1"]),
        (AnyNumber(), ((X, T), CLASSES), ["inputs.0", "inputs.1"]),
        (AnyNumber(), {"x": X, "t": T}, ["x", "t"]),
        (Named(), {"x": X, "t": T}, ["x", "t"]),
        (OneAndMore(), ((X, T), None), ["x", "rest.0"]),
        (OneAndMore(), {"rest.0": T, "x": X}, ["x", "rest.0"]),
        (TakesPair(), {"ids": STEPS, "image": X}, ["image", "ids"]),
        (TakesBundle(), {"image": X, "ids": STEPS}, ["image", "ids"]),
        (Diffusion(), {"x": X, "t": STEPS, "mask": None}, ["x", "t"]),
        (Diffusion(), (X, STEPS, None), ["x", "t"]),
    ],
    ids=[
        "any",
        "any with labels",
        "any by name",
        "named",
        "more",
        "more by name",
        "pair",
        "mapping",
        "none",
        "none in a tuple",
    ],
)
def test_arguments_of_every_kind(model: nn.Module, data: Any, inputs: list[str]) -> None:
    compiled = kancompile.compile(model, data)
    assert names(compiled)[0] == inputs
    check(compiled, data)


def test_a_state_that_is_fed_back_is_called_alike_everywhere() -> None:
    data = {"x": X, "h": np.tanh(T)}
    compiled = kancompile.compile(Cell(), data)
    assert names(compiled) == (["x", "h"], ["y", "h_1"])
    check(compiled, data)
    assert list(compiled.validate(data).compiled.parts) == ["y", "h_1"]
    assert compiled.manifest["outputs"] == ["y", "h_1"]


def test_an_array_without_an_input_is_said() -> None:
    compiled = kancompile.compile(Two(), {"x": X, "t": T, "weight": T})
    assert "calibration: 'weight' not read, the model's forward has no such input" in compiled.calibration.notes


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            Diffusion(),
            {"x": X, "t": STEPS.astype(np.float32)},
            r"found fractions in 'x', whole numbers as floats in 't'.*int64",
        ),
        (Tokens(), IDS.astype(np.float32), "expected integers where the model looks up.*found whole numbers as floats"),
        (Tokens(), IDS + 1, "found 1 ... 20, in rows of 6"),
        (Joined(), {"x": X, "t": STEPS[:, None]}, r"it takes 't' without its last dimension: pass x\[..., 0\]"),
        (Diffusion(), {"x": X, "t": STEPS, "mask": T[:, :5]}, r"where model\(x=..., t=..., mask=...\) runs"),
        (Diffusion(), {"x": X, "t": np.array(3)}, "120 rows of 'x', a single number of 't'"),
        (Diffusion(), {"x": X, "t": STEPS.astype(np.uint8)}, "numbers that the model looks up as x.astype"),
        (Classifier(), {"input_ids": IDS, "labels": CLASSES}, "without 'labels' it does: leave it out, or name it 'y'"),
        (Classifier(), (IDS, IDS > 3), r"by name, or as \(\(input_ids, mask\), labels\)"),
        (Classifier(), (IDS, IDS > 3, CLASSES), r"by name, or as \(\(input_ids, mask\), labels\)"),
        (AnyNumber(), (X, T), r"by name, or as \(\(a, b\), labels\)"),
    ],
)
def test_wrong_data_are_named(model: nn.Module, data: Any, words: str) -> None:
    with pytest.raises(KanCompileError, match=words):
        kancompile.compile(model, data)


def test_a_length_that_no_position_has_is_not_blamed_on_the_type() -> None:
    """Integers fail otherwise than floats, and that is what counts."""

    class Placed(Tokens):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.embedding.weight[: 6 * 20].sum() + self.b.weight.new_zeros(6, 1)

    with pytest.raises(KanCompileError) as caught:
        kancompile.compile(Placed(), np.concatenate([IDS, IDS], 1))
    assert "indices" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.py").write_text("from tests.compiler.test_odd_interfaces import Classifier\n")
    np.savez(tmp_path / "data.npz", input_ids=IDS, mask=IDS > 3, y=CLASSES)
    return tmp_path


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_labels_and_several_outputs_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = ["--against", "users.py:Classifier"], ["--data", "data.npz"]
    compiling = [
        "compile",
        "users.py:Classifier",
        "--calibration",
        "data.npz",
        "--out",
        "out",
        "--no-timing",
        "--report",
    ]
    assert main(compiling) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "accuracy" in text
    assert "output hidden" in text
    report = json.loads((folder / "out" / "model.report.json").read_text())
    jsonschema.validate(report, report_schema())
    assert report["model"]["inputs"] == [
        {"name": "input_ids", "shape": [6], "dtype": "int64"},
        {"name": "mask", "shape": [6], "dtype": "bool"},
    ]
    assert [entry["name"] for entry in report["summary"]["tensors"]] == ["logits", "hidden"]
    assert "int64, batch x 6" in (folder / "out" / "model.report.html").read_text()
    assert main(["validate", "out/model.onnx", *model, *data, "--max-drop", "100"]) == 0, capsys.readouterr().err
    assert "output logits" in capsys.readouterr().out
    assert main(["inspect", "--model", "users.py:Classifier", *data]) == 0, capsys.readouterr().err
    assert "2 KAN layers" in capsys.readouterr().out
    assert main(["inspect", "--model", "users.py:Classifier"]) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_an_open_length_fits_the_schema() -> None:
    found = describe_interface(Interface((Input("x", (5, 4), dynamic={1: "time"}),)))
    jsonschema.validate(found["inputs"], report_schema()["properties"]["model"]["properties"]["inputs"])
    assert found["inputs"][0]["shape"] == ["time", 4]


@pytest.mark.slow
def test_diagnosis_scales_no_tokens() -> None:
    """Neither integers nor floats that the model casts: an embedding would not know them."""

    class Cast(Tokens):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.long())

    with torch.no_grad():
        labels = Tokens()(torch.from_numpy(IDS)).argmax(-1).numpy()
    for model, ids in ((Tokens(), IDS), (Cast(), IDS.astype(np.float32))):
        found = kancompile.diagnose(model, {"x": ids, "y": labels})
        assert "accuracy" in found.text()
