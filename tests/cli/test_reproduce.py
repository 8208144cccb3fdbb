"""``kancompile reproduce``: what a manifest names gives the same bytes again, and what changed is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from kancompile.cli.main import main
from kancompile.cli.reproduce import differences
from kancompile.compiler.pair import sealed
from kancompile.compiler.reproduction import first_difference

MODELS = """
import torch
from torch import nn

class Waves(nn.Module):
    def __init__(self, n_out=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, 6, generator=torch.Generator().manual_seed(0)))
        self.eval()
    def forward(self, x):
        return torch.cat([torch.sin(2 * x), torch.cos(3 * x)], dim=1) @ self.weight.T

def make(n_out=3):
    return Waves(n_out)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile from relative paths, and for two targets at once."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "models.py").write_text(MODELS)
    np.savez(folder / "train.npz", x=np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32))
    save_file({"weight": torch.randn(2, 6, generator=torch.Generator().manual_seed(1))}, folder / "kan.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["compile", "models.py:make", "--factory-arg", "n_out=2", "--checkpoint", "kan.safetensors"]
        command += ["--calibration", "train.npz", "--out", "out", "--seed", "3", "--no-timing", "--quiet"]
        command += ["--method", "gptq", "--weight-bits", "5", "--target", "ort-cpu", "--target", "c99"]
        assert main(command) == 0
    return folder


@pytest.fixture
def work(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(compiled, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def reproduced(manifest: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["reproduce", manifest, "--trust-manifest", "--json", "--quiet"])
    return code, json.loads(capsys.readouterr().out)


def change(path: Path, **said: Any) -> None:
    """Write another manifest with a hash of its own that fits."""
    manifest = json.loads(path.read_text()) | said
    del manifest["manifest_sha256"]
    path.write_text(json.dumps(sealed(manifest)))


def test_the_same_inputs_give_the_same_bytes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = reproduced("out/model.manifest.json", capsys)
    assert (code, said["reproduced"], said["differences"]) == (0, True, [])
    assert said["file"] == "out/model.onnx"
    assert said["changed_inputs"] == said["changed_versions"] == said["changed_facts"] == []


@pytest.mark.slow
def test_a_file_of_another_target_and_its_companion(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "out" / "model.h").unlink()
    code, said = reproduced("out/model.c.manifest.json", capsys)
    assert (code, said["differences"]) == (1, ["model.h differs or is missing"])
    assert said["file"] == "out/model.c"
    assert said["model_sha256"] == said["model_sha256_now"]


def test_other_weights_and_another_version_are_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"weight": torch.randn(2, 6, generator=torch.Generator().manual_seed(2))}, work / "kan.safetensors")
    path = work / "out" / "model.manifest.json"
    change(path, versions=json.loads(path.read_text())["versions"] | {"torch": "2.0.0"})
    assert main(["reproduce", "out/model.manifest.json", "--trust-manifest"]) == 1
    text = capsys.readouterr().out
    assert "not reproduced: the bytes are others than the manifest names" in text
    assert "files differ from initializer" in text
    assert "changed: the model's weights" in text
    assert "changed: the checkpoint" in text
    assert f"changed: torch 2.0.0 then, {torch.__version__} now" in text
    assert "changed: the calibration data" not in text


def test_another_file_beside_the_manifest_is_told(work: Path) -> None:
    manifest = json.loads((work / "out" / "model.manifest.json").read_text())
    again = SimpleNamespace(manifest=manifest, companions={})
    assert differences(work / "out" / "model.onnx", manifest, again) == []
    assert differences(work / "out" / "model.c", manifest, again) == [
        "model.c beside the manifest is not the file that it names"
    ]


def test_where_files_begin_to_differ(work: Path) -> None:
    then = (work / "out" / "model.onnx").read_bytes()
    assert first_difference(then, then, True) is None
    model = onnx.load_model_from_string(then)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[[2, 5]] ^= 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    found = first_difference(then, model.SerializeToString(), True)
    assert f"initializer {tensor.name!r}: 2 of {values.size:,} values, the first at [" in str(found)
    model = onnx.load_model_from_string(then)
    model.metadata_props[0].value = "other"
    assert first_difference(then, model.SerializeToString(), True) == f"metadata {model.metadata_props[0].key}"
    del model.graph.node[-1]
    assert "the number of nodes" in str(first_difference(then, model.SerializeToString(), True))
    assert first_difference(b"a\nb\nc", b"a\nb\nd", False) == "byte 4 (line 3) of 5 then and 5 now"
    assert first_difference(b"a", b"a\n", False) == "byte 1 (line 1) of 1 then and 2 now"


def test_code_is_run_for_those_who_trust_the_manifest(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "out/model.manifest.json"]) == 2
    assert "runs the code of 'models.py:make'" in capsys.readouterr().err
    path = work / "out" / "model.manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"models.py:make"', '"os:system"'))
    assert main(["reproduce", "out/model.manifest.json", "--trust-manifest"]) == 2
    assert "was changed after it was written" in capsys.readouterr().err
    path.write_text(text)
    manifest = json.loads(text)
    change(path, made_from=manifest["made_from"] | {"held_out": "a lot"})
    assert main(["reproduce", "out/model.manifest.json", "--trust-manifest"]) == 2
    assert "made_from: found 'a lot' at .held_out" in capsys.readouterr().err
    del manifest["made_from"], manifest["manifest_sha256"]
    path.write_text(json.dumps(sealed(manifest)))
    assert main(["reproduce", "out/model.manifest.json", "--trust-manifest"]) == 2
    assert "names no model and no data" in capsys.readouterr().err
