"""Large tensors stand in a second file, which runtimes find under whatever name the first one is saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import Tensor, nn

import kancompile
from kancompile.compiler import CompiledModel, emission, why_torn
from kancompile.errors import KanCompileError
from kancompile.ir import ModelWithExternalData
from kancompile.runtimes import RuntimeModel, read_model
from kancompile.targets import TARGETS
from kancompile.targets.onnx import external_data
from kancompile.validation import audit_kernels


class Words(nn.Module):
    """A table of embeddings, and functions of what it gives."""

    def __init__(self, words: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(words, 4, generator=draw))
        self.weight = nn.Parameter(torch.randn(3, 8, generator=draw))

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids[:, 0], self.table)
        return torch.cat([torch.sin(x), torch.cos(2 * x)], dim=1) @ self.weight.T


IDS = torch.randint(0, 600, (80, 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_data, "MOST_FILE_BYTES", 5000)
        patch.setattr(external_data, "_ROOM", 0)
        return kancompile.compile(Words(600).eval(), {"ids": IDS.numpy()}, recipe={"storage": "fastest"})


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.save(tmp_path_factory.mktemp("external") / "words.onnx")


def test_a_saved_file_computes_what_the_simulation_does(compiled: CompiledModel, saved: Path) -> None:
    expected = compiled.program(IDS).numpy()
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "words.manifest.json",
        "words.onnx",
        "words.onnx.data",
    ]
    assert saved.stat().st_size < 600 * 4 * 4 <= (saved.parent / "words.onnx.data").stat().st_size
    onnx.checker.check_model(str(saved), full_check=True)
    stock = onnxruntime.InferenceSession(str(saved), providers=["CPUExecutionProvider"])
    assert np.array_equal(stock.run(None, {"input": IDS.numpy()})[0], expected)
    assert np.array_equal(RuntimeModel(saved)(IDS), expected)
    assert np.array_equal(RuntimeModel(compiled.session_bytes)(IDS), expected)
    assert not audit_kernels(saved).problems


def test_it_is_the_file_that_holds_everything(compiled: CompiledModel, saved: Path) -> None:
    whole = compiled.for_target("ort-cpu").model_bytes
    loaded = onnx.load(saved)
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    assert not isinstance(whole, ModelWithExternalData)
    expected = {one.name: to_array(one).tobytes() for one in onnx.load_from_string(whole).graph.initializer}
    assert {one.name: to_array(one).tobytes() for one in loaded.graph.initializer} == expected
    assert [str(node) for node in loaded.graph.node] == [str(node) for node in onnx.load_from_string(whole).graph.node]


def test_the_manifest_is_of_both_files(saved: Path) -> None:
    beside = saved.parent / "words.onnx.data"
    said = json.loads((saved.parent / "words.manifest.json").read_text())
    assert why_torn(said, saved.read_bytes()) is None
    assert said["external_sha256"] == hashlib.sha256(beside.read_bytes()).hexdigest()
    assert said["model_bytes"] == saved.stat().st_size + beside.stat().st_size


def test_a_second_file_that_is_too_short_is_named(compiled: CompiledModel, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "model.onnx")
    beside = tmp_path / "model.onnx.data"
    beside.write_bytes(beside.read_bytes()[:5000])
    assert isinstance(read_model(path), ModelWithExternalData)
    with pytest.raises(KanCompileError, match=r"model\.onnx'.*5,000 bytes of external data, expected [0-9,]+ or more"):
        RuntimeModel(path)


def test_what_a_larger_model_has_left_is_not_read(saved: Path, tmp_path: Path) -> None:
    """A second file belongs to a model that names tensors in it, whatever it is called."""
    model = tmp_path / "small.onnx"
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(np.zeros(2, np.float32), "w")])
    model.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (tmp_path / "small.onnx.data").write_bytes(b"left")
    assert type(read_model(model)) is bytes
    assert isinstance(read_model(saved), ModelWithExternalData)
    model.write_bytes(b"no model")
    assert read_model(model) == b"no model"


def test_targets_of_one_file_refuse_early(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emission, "MOST_FILE_BYTES", 9599)
    emission.check_file_size(TARGETS["ort-cpu"], compiled.captured)
    for name in ("ort-mobile", "qnn", "c99", "litert"):
        with pytest.raises(KanCompileError, match=r"9,600 bytes of constants outside the KAN layers \('.*table'"):
            emission.check_file_size(TARGETS[name], compiled.captured)
