"""Files of models, manifests and caches of odd content, and damaged files of every kind."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from kancompile.cli.main import main
from kancompile.data.calibration import load_calibration
from kancompile.data.state_dict import apply_state_dict, load_state_dict
from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.laboratory import Outcome
from kancompile.diagnosis.tune_cache import TuneCache
from kancompile.errors.exceptions import KanCompileError
from kancompile.recipe import read_recipe
from kancompile.reporting.facts.inspection import describe_file, describe_manifest, manifest_table
from kancompile.reporting.facts.source import _manifest, recipe_and_seed
from kancompile.runtimes.output_quantum import output_quantum
from kancompile.runtimes.session import RuntimeModel, run_reference
from kancompile.validation.kernel_audit import audit_kernels
from tests.compiled_kan import FACTORY, FACTORY_ARGS, compiled_kan, make_inputs

DEEP = "[" * 100_000


def _model(output: int = TensorProto.FLOAT, batch: Any = "b", **metadata: str) -> bytes:
    """Write a file that casts its input, ``[batch, 3]``."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=output)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", output, [batch, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {f"kancompile.{key}": value for key, value in metadata.items()})
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("content", [b"", b"text", b"\x0a\xff", bytes(100)])
def test_files_that_are_no_onnx(content: bytes) -> None:
    for read in (describe_file, RuntimeModel, audit_kernels, lambda model: run_reference(model, torch.zeros(1, 3))):
        with pytest.raises(KanCompileError):
            read(content)
    with pytest.raises(KanCompileError):
        output_quantum(content)


def test_onnx_files_of_odd_content() -> None:
    model = onnx.load_model_from_string(_model())
    model.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(KanCompileError, match="found no ONNX model"):
        describe_file(model.SerializeToString())
    content = _model().replace(b"Cast", b"C\xffst")  # an operator whose name is no UTF-8
    with pytest.raises(KanCompileError, match="found no ONNX model"):
        describe_file(content)
    with pytest.raises(KanCompileError, match="found a batch of 0 samples"):
        RuntimeModel(_model(batch=0))
    for text in (b"ROWS", b"x"):  # of a dimension, of an input
        content = _model(batch="ROWS").replace(text, b"\xff" * len(text))
        with pytest.raises(KanCompileError, match="cannot load it"):
            RuntimeModel(content)
    RuntimeModel(_model(batch="ROWS"))
    with pytest.raises(KanCompileError, match="found an output of ndarray, expected tensors of numbers"):
        RuntimeModel(_model(TensorProto.STRING))(torch.zeros(2, 3))


def test_what_cannot_be_loaded_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model().replace(b"Cast", b"C\xffst"))
    compiled_kan()
    capfd.readouterr()
    for read in (RuntimeModel, audit_kernels):
        with pytest.raises(KanCompileError, match=r"model .*m\.onnx"):
            read(path)
    model = onnx.load_model_from_string(compiled_kan().model_bytes)
    model.graph.initializer[0].raw_data += b"\0"
    path.write_bytes(model.SerializeToString())
    for read in (RuntimeModel, audit_kernels):
        with pytest.raises(KanCompileError, match=r"model .*m\.onnx"):
            read(path)
    assert capfd.readouterr() == ("", "")


def test_what_a_file_says_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model(version="\x1b[2J"))
    assert main(["inspect", str(path)]) == 0
    assert "version: \\x1b[2J" in capsys.readouterr().out


def test_names_in_optimised_graphs_may_be_bytes(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(_model())
    model.graph.node[0].name = "name"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(b"name", b"n\xffme"))
    with pytest.raises(KanCompileError, match=r"model .*m\.onnx.*: cannot be read"):
        audit_kernels(path)


def test_metadata_of_odd_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    for layers, code in (("5", 2), (DEEP, 2), ("[{}]", 2), ('[{"name": "\\ud800", "expansions": [], "n_out": 1}]', 0)):
        path.write_bytes(_model(layers=layers, recipe="1e999", version="0.1", seed="9" * 5000))
        read = describe_file(path)["metadata"]
        assert (read["version"], read["recipe"], read["seed"]) == ("0.1", "1e999", "9" * 5000)
        for options in ([], ["--json"]):
            assert main(["inspect", str(path), *options]) == code
            assert "Traceback" not in capsys.readouterr().err


FACTS = {
    "version": "0", "target": "ort-cpu", "seed": "0", "recipe": "{}", "recipe_sha256": "0", "calibration_sha256": "0",
    "versions": "{}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", text) for text in ("[]", "1e3", str(1 << 80), DEEP)),
        *(("recipe", text) for text in ("5", '{"layers": [1]}')),
        ("versions", "null"),
    ],
)
def test_reports_of_files_with_odd_metadata(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(**FACTS))
    recipe_and_seed(path)
    path.write_bytes(_model(**FACTS | {key: value}))
    with pytest.raises(KanCompileError, match=r"recipe|report: metadata"):
        recipe_and_seed(path)


def test_manifests_of_odd_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = compiled_kan()
    path, manifest = tmp_path / "model.onnx", tmp_path / "model.manifest.json"
    compiled.save(path)
    whole = json.loads(manifest.read_text())
    assert _manifest(path, compiled.model_bytes) == whole
    assert main(["inspect", str(path)]) == 0
    assert "beside it" not in capsys.readouterr().err
    manifest.write_text(json.dumps(whole | {"seed": 1}))
    assert _manifest(path, compiled.model_bytes) is None
    assert "model.manifest.json was changed after it was written, so it is not used" in capsys.readouterr().err
    assert main(["inspect", str(path)]) == 0
    assert "note: model.manifest.json beside it was changed after it was written" in capsys.readouterr().err
    assert _manifest(path, compiled.model_bytes + b"\0") is None
    assert "model.manifest.json is the manifest of another file, so it is not used" in capsys.readouterr().err
    manifest.rename(tmp_path / "away")
    assert _manifest(path, compiled.model_bytes) is None
    assert "found no model.manifest.json beside the file" in capsys.readouterr().err
    (tmp_path / "model.c").write_bytes(compiled.model_bytes)
    for wrong in (DEEP, "", "\ud800", "{", "9" * 5000):
        manifest.write_text(wrong, encoding="utf-8", errors="surrogatepass")
        for read in (lambda: describe_manifest(tmp_path / "model.c"), lambda: _manifest(path, compiled.model_bytes)):
            with pytest.raises(KanCompileError, match=r"manifest .*found no JSON|manifest .*cannot be read"):
                read()
    for key, value in (
        ("layers", None),
        ("layers", [{}]),
        ("notes", [1]),
        ("versions", 3),
        ("seed", "0"),
        ("calibration", {}),
    ):
        manifest.write_text(json.dumps(compiled.manifest | {key: value}))
        with pytest.raises(KanCompileError, match=r"model.manifest.json.*; delete it, or compile the model again"):
            _manifest(path, compiled.model_bytes)
        described = describe_manifest(tmp_path / "model.c")
        if key == "layers":
            with pytest.raises(KanCompileError, match="its layers: cannot be read"):
                manifest_table(described)


def test_facts_of_odd_content(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    fact = Outcome(1.0, 0.5, 3.0, None, None, None, 99.0, 10)
    TuneCache(path, {}).put({"a": 1}, fact)
    whole = path.read_text()
    path.write_text(whole + DEEP + "\n" + "9" * 5000 + "\n")
    assert TuneCache(path, {}).get({"a": 1}, Outcome) == fact
    with pytest.raises(KanCompileError, match="expected the fields of Anatomy"):
        TuneCache(path, {}).get({"a": 1}, Anatomy)
    for right, wrong in (
        ('"signal": 1.0', '"signal": "x"'),
        ('"noise": 0.5', '"noise": null'),
        ('"noise"', '"more": 1, "noise"'),
        ('"constant_bytes": 10', '"constant_bytes": true'),
        ('"constant_bytes": 10, ', ""),
    ):
        path.write_text(whole.replace(right, wrong))
        with pytest.raises(KanCompileError, match=r"cache .*facts.jsonl.*: found a fact .*delete the file"):
            TuneCache(path, {}).get({"a": 1}, Outcome)


def _damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut a file, change some of its bytes, or repeat a piece of it elsewhere."""
    found = bytearray(content)
    kind = chance.randrange(3)
    if kind == 0:
        return content[: chance.randrange(len(content))]
    for _ in range(chance.randrange(1, 5)):
        at, other = chance.randrange(len(found)), chance.randrange(len(found))
        if kind == 1:
            found[at] = chance.randrange(256)
        else:
            found[at : at + 16] = found[other : other + 16]
    return bytes(found)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({"model": state, "epoch": 1}, tmp_path / "w.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "w.npz", **{key: value.numpy() for key, value in state.items()})
    np.savez_compressed(tmp_path / "x.npz", x=np.ones((9, 3), np.float32))
    np.save(tmp_path / "x.npy", np.ones((9, 3), np.float32))
    (tmp_path / "r.toml").write_text('levels = 0xFF\n[layers."a.*"]\nweight_bits = 4\n')
    (tmp_path / "r.json").write_text(json.dumps(read_recipe({"levels": 64}).to_dict()))
    (tmp_path / "m.onnx").write_bytes(compiled_kan().model_bytes)
    compiled = compiled_kan().for_target("c99")
    compiled.save(tmp_path / "m.c")

    def weights(path: Path) -> None:
        apply_state_dict(nn.Linear(3, 2), load_state_dict(path))

    def inspect(path: Path) -> None:
        code = main(["inspect", str(path)])
        assert "internal error" not in capsys.readouterr().err
        assert code in (0, 2)

    def beside(path: Path) -> None:
        inspect(path.with_name("m.c"))

    def run(path: Path) -> None:
        model = RuntimeModel(path)
        model.check_input(np.zeros((1, 6), np.float32), "data")
        model(make_inputs(3))
        output_quantum(path.read_bytes())

    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("w.pt", weights), ("old.pt", weights), ("w.npz", weights), ("x.npz", load_calibration), ("x.npy", load_calibration),
        ("r.toml", read_recipe), ("r.json", read_recipe), ("m.onnx", inspect), ("m.onnx", run), ("m.manifest.json", beside),
    ]  # fmt: skip
    chance = random.Random(0)
    for name, read in readers:
        path = tmp_path / name
        whole = path.read_bytes()
        read(path)
        for _ in range(25):
            path.write_bytes(_damaged(whole, chance))
            with contextlib.suppress(KanCompileError):
                read(path)
        path.unlink()  # of a file that is mapped, the pages must not change
        path.write_bytes(whole)


def test_damaged_files_end_a_command_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", x=make_inputs().numpy())
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x03\x00'''")
    (tmp_path / "deep.json").write_text(DEEP)
    torch.save([torch.zeros(1)], tmp_path / "c.pt")
    model = [FACTORY, "--factory-arg", FACTORY_ARGS]
    good, out = ["--calibration", str(tmp_path / "x.npz")], ["--out", str(tmp_path / "out")]
    for arguments in (
        [*model, "--calibration", str(tmp_path / "bad.npy"), *out],
        [*model, *good, *out, "--recipe", str(tmp_path / "deep.json")],
        [*model, *good, *out, "--checkpoint", str(tmp_path / "c.pt")],
    ):
        assert main(["compile", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.count("kancompile: error: ") == 1
        assert "Traceback" not in printed
