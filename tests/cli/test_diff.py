"""Two files side by side: what they say of themselves, and every byte."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from kancompile.cli.main import main
from tests.compiled_kan import compiled_kan


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A file, one that says the same of itself in other bytes, and one that says otherwise."""
    folder = tmp_path_factory.mktemp("files")
    first, renamed, other = (folder / f"{name}.onnx" for name in ("first", "renamed", "other"))
    first.write_bytes(compiled_kan().model_bytes)
    proto = onnx.load(first)
    proto.graph.node[0].doc_string = "another text"
    onnx.save(proto, renamed)
    said = {entry.key: entry for entry in proto.metadata_props}
    layers = json.loads(said["kancompile.layers"].value)
    layers[0] |= {"weight_bits": 3, "weight_bytes": 1}
    said["kancompile.layers"].value = json.dumps(layers[:1])
    recipe = json.loads(said["kancompile.recipe"].value)
    said["kancompile.recipe"].value = json.dumps(recipe | {"weight_bits": 3, "layers": {"layers.0": {"levels": 64}}})
    said["kancompile.seed"].value = "7"
    onnx.save(proto, other)
    return first, renamed, other


def test_equal_files_are_equal(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = files
    assert main(["diff", str(first), str(first)]) == 0
    assert capsys.readouterr().out.startswith(f"equal: {first}")


def test_what_differs_is_said(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, renamed, other = files
    assert main(["diff", str(first), str(other), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == [first.stat().st_size, other.stat().st_size]
    before, _ = compiled_kan().manifest["layers"]
    changed = {"weight_bits": [8, 3], "weight_bytes": [before["weight_bytes"], 1]}
    assert found["layers"] == [
        {"name": "layers.0", "only": "", "changed": changed},
        {"name": "layers.1", "only": "only in the first file", "changed": {}},
    ]
    assert found["recipe"] == {"weight_bits": [8, 3], "layers.0: levels": ["default", 64]}
    assert found["metadata"] == {"seed": [0, 7]}
    assert main(["diff", str(first), str(other)]) == 1
    text = capsys.readouterr().out
    assert "recipe: weight_bits 8 -> 3, layers.0: levels default -> 64" in text
    assert "layer layers.1: only in the first file" in text
    # alike in all that a file says of itself, so that bytes alone tell
    assert main(["diff", str(first), str(renamed)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("bytes differ from node 0")


def test_what_is_no_model_is_refused(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert main(["diff", str(files[0]), str(tmp_path / "broken.onnx")]) == 2
    assert "found no ONNX model" in capsys.readouterr().err
