"""``kancompile train``: from a model, samples with labels and a number of bits to a trained file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from kancompile.cli import exit_codes
from kancompile.cli.main import main
from kancompile.runtimes import RuntimeModel
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_inputs, make_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    model, x = make_model(), make_inputs(300)
    save_file(model.state_dict(), folder / "kan.safetensors")
    np.savez(folder / "train.npz", x=x.numpy(), y=model(x).argmax(1).numpy())
    np.savez(folder / "unlabelled.npz", x=x.numpy())
    return folder


def _train(work: Path, out: Path, *more: str, data: str = "train.npz") -> list[str]:
    checkpoint = ["--checkpoint", str(work / "kan.safetensors")]
    named = [
        "train",
        FACTORY,
        "--factory-arg",
        FACTORY_ARGS,
        *checkpoint,
        "--data",
        str(work / data),
        "--out",
        str(out),
    ]
    return [*named, "--quiet", "--batch-size", "30", *more]


@pytest.mark.slow  # compiles, trains and measures twice
def test_it_writes_a_trained_file(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--weight-bits", "2", "--method", "uniform", "--levels", "16", "--epochs", "2", "--json")
    assert main(_train(work, tmp_path, *asked)) == exit_codes.OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.manifest.json", "model.onnx"]
    report = json.loads(capsys.readouterr().out)
    (file,) = report["files"]
    assert report["held_out_losses"][-1] < report["held_out_losses"][0]
    assert file["trained"]["runtime_against_simulation"]["differing"] == 0
    assert file["trained"]["n_samples"] == 30
    manifest = json.loads((tmp_path / "model.manifest.json").read_text())
    assert [layer["weight_bits"] for layer in manifest["layers"]] == [2, 2]
    assert manifest["training"]["epochs"] == 2
    assert manifest["training"]["samples"] == 240
    assert RuntimeModel((tmp_path / "model.onnx").read_bytes()).run(make_inputs(3).numpy())[0].shape == (3, 3)


def test_wrong_choices_are_refused_at_once(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str, data: str = "train.npz") -> str:
        assert main(_train(work, tmp_path, *more, data=data)) == exit_codes.USAGE
        return capsys.readouterr().err

    assert "'pact', which is a method for index" in refused("--weights", "pact")
    assert "expected one of" in refused("--index", "awq")
    assert "found no labels" in refused(data="unlabelled.npz")
    assert "found 0 epochs" in refused("--epochs", "0")
    assert "of which 3 would be held out" in refused("--held-out", "0.01")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # several compilations
def test_it_resumes_and_trains_several_widths(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--widths", "4,2", "--method", "uniform", "--levels", "16", "--index", "lsq+", "--epochs", "2")
    assert main(_train(work, tmp_path / "one", *asked)) == exit_codes.OK
    names = ["model.w2.manifest.json", "model.w2.onnx", "model.w4.manifest.json", "model.w4.onnx"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names

    # a threshold that is missed leaves the states, with which the next run only writes
    assert main(_train(work, tmp_path / "two", *asked, "--min-sqnr", "90")) == exit_codes.THRESHOLD_MISSED
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "two").iterdir())
    assert "nothing written" in capsys.readouterr().err
    missing = _train(work, tmp_path / "two", *asked, "--learning-rate", "0.02", "--resume")
    assert main(missing) == exit_codes.USAGE
    assert "found no state" in capsys.readouterr().err
    assert main(_train(work, tmp_path / "two", *asked, "--resume")) == exit_codes.OK
    for name in names[1::2]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
