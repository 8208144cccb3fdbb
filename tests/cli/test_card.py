"""Model cards: a header that a YAML parser reads, and facts that are those of the manifest and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from kancompile.cli.main import main
from tests.compiled_kan import compiled_kan

PAIRED = {"accuracy_interval": [90.0, 99.0]}
SUMMARY = {
    "task": {"name": "accuracy", "float": 97.5, "compiled": 96.25, "paired": PAIRED},
    "sqnr_db": 40.0,
    "worst": None,
    "top1_agreement": 98.0,
    "size": {"float_export_bytes": 9000, "compiled_bytes": 3000},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    compiled_kan().save(tmp_path / "build" / "model.onnx")
    return tmp_path / "build"


def header(card: str) -> tuple[dict[str, Any], str]:
    import yaml

    _, front, body = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found, body


@pytest.mark.needs("yaml")
def test_a_card_says_what_manifest_and_report_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = compiled_kan().manifest
    assert main(["card", str(folder), "--name", 'digits: "8 bits"', "--license", "apache-2.0"]) == 0
    assert "so the card has no results" in capsys.readouterr().out
    front, body = header((folder / "README.md").read_text())
    assert (front["library_name"], front["base_model_relation"]) == ("kancompile", "quantized")
    assert front["license"] == "apache-2.0"
    assert {"kan", "onnxruntime", "8-bit"} <= set(front["tags"])
    assert not {"base_model", "metrics", "model-index"} & set(front)
    assert str(manifest["model_sha256"]) in body
    assert '# digits: "8 bits"' in body
    report = {"model": {"name": "model.onnx", "sha256": manifest["model_sha256"]}, "measured_on": "80 samples"}
    (folder / "model.report.json").write_text(json.dumps(report | {"summary": SUMMARY}))
    options = ["--force", "--task", "tabular-classification", "--dataset", "digits", "--base-model", "me/kan"]
    assert main(["card", str(folder), *options]) == 0
    front, body = header((folder / "README.md").read_text())
    (result,) = front["model-index"][0]["results"]
    assert result["task"] == {"type": "tabular-classification"}
    assert result["metrics"][0]["value"] == pytest.approx(0.9625)
    assert (front["base_model"], front["metrics"]) == ("me/kan", ["accuracy"])
    assert "| accuracy | 97.50 % | 96.25 % |" in body


def test_a_card_is_about_files_with_their_own_manifests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text("mine")
    assert main(["card", str(folder)]) == 2
    assert "file exists" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    proto = onnx.load(folder / "model.onnx")
    proto.doc_string = "changed"
    onnx.save(proto, folder / "model.onnx")
    assert main(["card", str(folder), "--force"]) == 2
    assert "copy the two together" in capsys.readouterr().err
    assert main(["card", str(folder / "nowhere")]) == 2
    assert "expected a folder that kancompile compile wrote" in capsys.readouterr().err
