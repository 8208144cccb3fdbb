"""The command line: what newcomers type, exit codes, clean output, and files that are complete or absent."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kancompile.cli import exit_codes
from kancompile.cli.main import main
from kancompile.errors.exceptions import KanCompileError
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_inputs, make_model

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    model, x = make_model(), make_inputs(100)
    save_file(model.state_dict(), folder / "kan.safetensors")
    y = model(x).argmax(1).numpy()
    np.savez(folder / "train.npz", x=x.numpy(), y=y)
    np.savez(folder / "unlabelled.npz", x=x.numpy())
    test = make_inputs(60, seed=1)
    np.savez(folder / "test.npz", inputs=test.numpy(), y=model(test).argmax(1).numpy())
    return folder


def _model(work: Path) -> list[str]:
    return ["--factory-arg", FACTORY_ARGS, "--checkpoint", str(work / "kan.safetensors")]


def _compile(work: Path, out: Path, *more: str, data: str = "train.npz") -> list[str]:
    return ["compile", FACTORY, *_model(work), "--calibration", str(work / data), "--out", str(out), *more]


@pytest.fixture(scope="module")
def built(work: Path) -> Path:
    assert main(_compile(work, work / "built", "--quiet", "--weight-bits", "4", "--method", "gptq")) == 0
    return work / "built" / "model.onnx"


def test_compile_writes_a_model_and_its_manifest(built: Path) -> None:
    assert sorted(path.name for path in built.parent.iterdir()) == ["model.manifest.json", "model.onnx"]
    manifest = json.loads((built.parent / "model.manifest.json").read_text())
    assert [layer["weight_bits"] for layer in manifest["layers"]] == [4, 4]
    assert manifest["recipe"]["method"] == "gptq"
    onnx.checker.check_model(onnx.load(built), full_check=True)


def test_compile_prints_a_summary(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_compile(work, tmp_path, "--layer", "*.0", "weight_bits=6", "--layer", "*.1", "levels=512")) == 0
    printed = capsys.readouterr()
    assert "2 KAN layers" in printed.out
    rows = [line.split() for line in printed.out.splitlines()]
    (first,), (second,) = ([row for row in rows if row[:1] == [name]] for name in ("layers.0", "layers.1"))
    assert first[1:6] == ["6", "x", "9", "5", "6"]  # inputs x functions, outputs, bits
    assert second[4:7] == ["3", "8", "512"]  # outputs, bits, levels
    assert first[-1] == second[-1] == "QGemm"
    assert "measured on 20 held-out calibration samples" in printed.out
    assert "0 of 60 outputs differ" in printed.out
    assert f"wrote {tmp_path / 'model.onnx'}" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_equal_commands_write_equal_bytes(work: Path, built: Path, tmp_path: Path) -> None:
    assert main(_compile(work, tmp_path, "--quiet", "--weight-bits", "4", "--method", "gptq")) == 0
    for name in ("model.onnx", "model.manifest.json"):
        assert (tmp_path / name).read_bytes() == (built.parent / name).read_bytes()


def test_json_is_the_only_thing_on_standard_output(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "loud.py"
    source.write_text(
        "from tests.compiled_kan import make_model\n"
        "print('loud')\n"
        "def make():\n"
        "    print('loud')\n"
        "    return make_model()\n"
    )
    arguments = ["compile", f"{source}:make", "--calibration", str(work / "train.npz"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["passed"] is True
    assert result["path"] == str(tmp_path / "o" / "model.onnx")
    assert result["validation"]["runtime_against_simulation"]["differing"] == 0
    assert "loud" in printed.err


def test_an_existing_output_stays_unless_forced(
    work: Path, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = built.read_bytes()
    started = time.perf_counter()
    assert main(_compile(work, built.parent)) == 2
    assert time.perf_counter() - started < 3  # refused before any work starts
    assert "file exists, expected a new name" in capsys.readouterr().err
    assert built.read_bytes() == before
    copy = work / "forced"
    copy.mkdir()
    (copy / "model.onnx").write_bytes(b"old")
    assert main(_compile(work, copy, "--force", "--quiet")) == 0
    onnx.load(copy / "model.onnx")


def test_a_missed_threshold_writes_nothing_and_exits_with_1(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_compile(work, tmp_path / "o", "--min-sqnr", "200", "--precision", "float")) == 1
    printed = capsys.readouterr()
    assert "threshold missed, nothing written: " in printed.err
    assert "SQNR is" in printed.err
    assert "in float already" in printed.err
    assert not (tmp_path / "o").exists()


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_a_missed_threshold_leaves_the_report_that_was_asked_for(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = ("--weight-bits", "2", "--method", "uniform", "--min-sqnr", "1", "--max-drop", "0", "--quiet")
    coarse = (*coarse, "--goal-sqnr", "-1000")
    assert main(_compile(work, tmp_path / "plain", *coarse)) == 1
    assert "threshold missed, nothing written: accuracy" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert main(_compile(work, tmp_path / "o", *coarse, "--report", "--json")) == 1
    printed = capsys.readouterr()
    page, data = (tmp_path / "o" / f"model.missed.report.{kind}" for kind in ("html", "json"))
    assert sorted((tmp_path / "o").iterdir()) == [page, data]
    assert f"threshold missed, no model written; {page} says where the error comes from: accuracy" in printed.err
    result, report = json.loads(printed.out), json.loads(data.read_text())
    assert (result["path"], result["passed"], list(result["files"])) == (None, False, [str(page), str(data)])
    assert report["summary"]["reasons"] == result["validation"]["reasons"] != []
    assert any(finding["severity"] == "serious" for finding in report["findings"])
    # the next attempt is not in its way
    assert main(_compile(work, tmp_path / "o", *coarse, "--report")) == 1
    assert main(_compile(work, tmp_path / "o", "--quiet", "--report")) == 0
    assert (tmp_path / "o" / "model.report.html").is_file()


def test_validate_compares_and_gates(work: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against = ["validate", str(built), "--against", FACTORY, *_model(work), "--data", str(work / "test.npz")]
    assert main([*against, "--data-key", "inputs", "--min-sqnr", "5", "--max-drop", "30", "--min-agreement", "60"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main([*against, "--min-sqnr", "200", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["passed"] is False
    assert "threshold missed: SQNR of output" in printed.err


def test_validate_finds_that_the_file_belongs_to_another_model(
    work: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {key: torch.flip(value, [0]) for key, value in make_model().state_dict().items()}
    save_file({key: value.contiguous() for key, value in other.items()}, tmp_path / "other.safetensors")
    arguments = ["validate", str(built), "--against", FACTORY, "--factory-arg", FACTORY_ARGS]
    arguments += ["--checkpoint", str(tmp_path / "other.safetensors"), "--data", str(work / "test.npz")]
    assert main([*arguments, "--min-sqnr", "5"]) == 1
    assert "not passed" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_prints_every_candidate(work: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", str(built), "--against", FACTORY, *_model(work), "--batch-sizes", "1,4", "--threads", "1"]
    assert main([*arguments, "--repeats", "3", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {(t["candidate"], t["batch_size"]) for t in result["timings"]} == {
        (name, size)
        for name in (
            "compiled, ONNX Runtime",
            "float export, ONNX Runtime",
            "float by kancompile, ONNX Runtime",
            "PyTorch eager",
        )
        for size in (1, 4)
    }


def test_inspect_shows_a_file(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built), "--kernels"]) == 0
    text = capsys.readouterr().out
    assert "opset ai.onnx 21, IR 10" in text
    assert "4-bit weights" in text
    assert "plane4: uint8" in text
    assert "QGemm" in text
    assert main(["inspect", str(built), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["bytes"] == built.stat().st_size
    assert len(described["metadata"]["layers"]) == 2
    assert described["metadata"]["recipe"]["weight_bits"] == 4


@pytest.mark.slow
def test_inspect_reads_the_manifest_of_other_formats(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_compile(work, tmp_path / "o", "--quiet", "--target", "c99")) == 0
    (source,) = (path for path in (tmp_path / "o").iterdir() if path.suffix == ".c")
    assert main(["inspect", str(source)]) == 0
    assert "6 inputs x" in capsys.readouterr().out
    source.write_bytes(source.read_bytes() + b"\n")
    assert main(["inspect", str(source)]) == 2
    assert "which is the manifest of another file" in capsys.readouterr().err
    (tmp_path / "alone.c").write_text("int x;")
    assert main(["inspect", str(tmp_path / "alone.c")]) == 2
    assert (
        "found no manifest beside it, expected alone.c.manifest.json or alone.manifest.json" in capsys.readouterr().err
    )


def test_inspect_shows_what_is_found_in_a_model(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mixed.py"
    source.write_text(
        "from torch import nn\nfrom tests.compiled_kan import make_model\n"
        "def make():\n    return nn.Sequential(make_model(), nn.Softmax(1))\n"
    )
    assert main(["inspect", "--model", f"{source}:make", "--input-shape", "6"]) == 0
    text = capsys.readouterr().out
    assert "2 KAN layers" in text
    assert "6 inputs x 9 functions" in text
    assert main(["inspect", "--model", f"{source}:make", "--input-shape", "6", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    softmax = [part for part in described["unrecognized"] if "softmax" in part["operator"]]
    assert softmax
    assert softmax[0]["reason"]


def test_exported_programs_compile_and_inspect_from_the_command_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(make_model(), (make_inputs(2),), dynamic_shapes=({0: batch},))
    path = tmp_path / "kan.pt2"
    torch.export.save(exported, path)
    assert main(["inspect", "--model", str(path)]) == 2
    assert "give --trust-model" in capsys.readouterr().err
    assert main(["inspect", "--model", str(path), "--trust-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [6]
    arguments = [
        "compile",
        str(path),
        "--trust-model",
        "--calibration",
        str(work / "train.npz"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*arguments, "--json", "--quiet", "--min-sqnr", "25"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_recipe_prints_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--weight-bits", "3", "--layer", "layers.0", "weight-bits=8", "method=awq"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "r.toml").write_text(first)
    assert main(["recipe", "--recipe", str(tmp_path / "r.toml")]) == 0
    assert capsys.readouterr().out == first
    assert main(["recipe", "--recipe", str(tmp_path / "r.toml"), "--levels", "64", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert recipe["levels"] == 64
    assert recipe["layers"] == {"layers.0": {"method": "awq", "weight_bits": 8}}


def _narrower(work: Path) -> list[str]:
    arguments = _compile(work, work / "no")
    arguments[arguments.index(FACTORY_ARGS)] = "layers_hidden=[6,4,3]"
    return arguments


INSPECT = ["inspect", "--model", FACTORY, "--factory-arg"]
WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "checkpoint of another size": (_narrower, "does not fit the model"),
    "labels wanted": (
        lambda w: _compile(w, w / "no", "--max-drop", "1", data="unlabelled.npz"),
        "expected an array 'y'",
    ),
    "no such data": (lambda w: _compile(w, w / "no", data="absent.npz"), "cannot be read"),
    "no such array": (lambda w: _compile(w, w / "no", "--calibration-key", "z"), "expected one named 'z'"),
    "no such model": (lambda w: ["inspect", "--model", "absent:f", "--input-shape", "3"], "no module 'absent'"),
    "no such file": (lambda w: ["inspect", str(w / "absent.onnx")], "cannot be read"),
    "no ONNX": (lambda w: ["inspect", str(w / "train.npz")], "found no ONNX model"),
    "nothing to inspect": (lambda w: ["inspect"], "either a MODEL.onnx file or --model"),
    "no input shape": (lambda w: [*INSPECT, FACTORY_ARGS], "found no --input-shape"),
    "a folder that nobody writes to": (lambda w: _compile(w, Path("/proc/kancompile")), "cannot write in '/proc'"),
    "a file where a folder belongs": (lambda w: _compile(w, w / "train.npz"), "is a file, expected a folder"),
    "wrong bits": (
        lambda w: _compile(w, w / "no", "--weight-bits", "9"),
        "weight_bits is 9, expected an integer 2 to 8",
    ),
    "no such layer": (lambda w: _compile(w, w / "no", "--layer", "head", "levels=64"), "'head' matches no layer"),
    "a layer override without value": (lambda w: ["recipe", "--layer", "a", "levels"], "expected KEY=VALUE"),
    "a factory argument without value": (lambda w: [*INSPECT, "x", "--input-shape", "3"], "expected NAME=VALUE"),
    "unknown target": (lambda w: _compile(w, w / "no", "--target", "tpu"), "target 'tpu' is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_message_and_exit_code_2(
    case: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, text = WRONG[case]
    assert main(arguments(work)) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert "kancompile: error: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (work / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compile"], "compile: error: the following arguments are required: MODEL, --calibration, --out"),
        (["compile", "m:f"], "required: --calibration, --out"),
        (["nonsense"], "found 'nonsense', expected one of compile, train, validate"),
        (["compille", "m:f"], "did you mean 'compile'?"),
        (
            ["compile", "m:f", "--calibratoin", "x.npz"],
            "found no option '--calibratoin'; did you mean '--calibration'?",
        ),
        (
            ["recipe", "--method", "gtpq"],
            "argument --method: found 'gtpq', expected one of auto, .*; did you mean 'gptq'?",
        ),
        (["inspect", "m", "n"], "found 'n', which nothing takes"),
        (["compile", "--held-out", "1.5"], "'1.5' is no share"),
        (["benchmark", "m", "--against", "f", "--batch-sizes", "a"], "'a' is no count"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(text.replace("?", r"\?"), line)
    assert re.fullmatch(r"kancompile.*--help\)", line)


def test_without_arguments_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "typical use" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["compile", "validate", "benchmark", "inspect", "recipe", "completion"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"  kancompile {command} " in text
    assert "exit codes" in text


def test_help_and_recipes_do_not_load_pytorch() -> None:
    for arguments in (["--help"], ["compile", "--help"], ["recipe"], ["completion", "bash"]):
        code = (
            "import sys\nfrom kancompile.cli.main import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
            "sys.exit(bool({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def _raising(error: BaseException) -> Callable[..., int]:
    def run(*_: Any) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (KanCompileError("layer 'a': wrong"), 2, "kancompile: error: layer 'a': wrong"),
        (ZeroDivisionError("bug"), 3, "internal error"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kancompile.cli.recipe.show_result", _raising(error))
    assert main(["recipe"]) == code
    assert text in capsys.readouterr().err


def test_an_interrupt_while_writing_leaves_no_files(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _raising(KeyboardInterrupt()))
    assert main(_compile(work, tmp_path / "o", "--quiet")) == 130
    assert list((tmp_path / "o").iterdir()) == []


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys\nfrom kancompile.cli.main import main\nsys.exit(main(['recipe']))"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert process.returncode == 0
    assert process.stderr == b""


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_no_partial_files(work: Path, tmp_path: Path) -> None:
    for number, delay in enumerate((0.3, 2.0, 5.0, 8.0)):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "kancompile", *_compile(work, out, "--quiet")]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        try:
            _, error = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
        assert process.returncode in (0, 130, -signal.SIGINT), error
        assert names in ([], ["model.manifest.json", "model.onnx"])


@pytest.mark.slow
def test_small_calibration_data_is_not_split(tmp_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "few.npz", x=make_inputs(8).numpy())
    arguments = ["compile", FACTORY, *_model(work), "--calibration", str(tmp_path / "few.npz"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "none held out" in printed.err
    assert "measured on the calibration data itself" in printed.out


def test_the_entry_point_is_the_module() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "kancompile", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout.startswith("kancompile ")
    assert exit_codes.OK == 0
    assert isinstance(make_model(), nn.Module)
