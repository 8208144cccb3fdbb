"""Samples in tables: files, data frames, data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kancompile
from kancompile.cli import main
from kancompile.data import load_calibration, open_data, read_table, stream_batches
from kancompile.errors import KanCompileError
from tests.compiled_kan import FACTORY, FACTORY_ARGS, N_IN, make_inputs, make_model

X = make_inputs(60).double().numpy()
with torch.no_grad():
    OUTPUTS = make_model()(make_inputs(60))
CLASSES = OUTPUTS.argmax(1).numpy()
NAMES = [f"f{number}" for number in range(N_IN)]


def write(path: Path, rows: Any, header: list[str] | None, mark: str = ",") -> str:
    lines = [mark.join(header)] if header else []
    path.write_text("\n".join([*lines, *(mark.join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def labelled() -> list[list[Any]]:
    """Give rows whose label stands between the features."""
    return [[*row[:2], int(label), *row[2:]] for row, label in zip(X.tolist(), CLASSES, strict=True)]


HEADER = [*NAMES[:2], "kind of", *NAMES[2:]]


@pytest.mark.parametrize(("target", "header"), [("kind of", HEADER), ("2", HEADER), ("2", None), ("-5", None)])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_files_with_a_target(target: str, header: list[str] | None, mark: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", labelled(), header, mark)
    samples = load_calibration(open_data(path, target_columns=[target]))
    np.testing.assert_array_equal(samples.inputs, X.astype(np.float32))
    assert samples.targets is not None
    assert samples.targets.dtype == np.int64
    np.testing.assert_array_equal(samples.targets, CLASSES)


def test_files_as_others_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.csv"
    lines = [f'{number},"{a}", {b}\r\n\r\n' for number, (a, b) in enumerate(X[:, :2].tolist())]
    path.write_bytes(("\ufeff,first,second\r\n" + "".join(lines)).encode())
    np.testing.assert_array_equal(read_table(path), X[:, :2])
    assert "counts the rows, is left out" in capsys.readouterr().err
    np.savetxt(path, X, header=",".join(NAMES), delimiter=",")
    np.testing.assert_array_equal(read_table(path), X)
    inputs, labels = read_table(Path(write(path, X, NAMES)), ["f0", "f1"])
    np.testing.assert_array_equal(inputs, X[:, 2:])
    np.testing.assert_array_equal(labels, X[:, :2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n1,2,3\n", r"found 3 cells in line 3, expected 2 as in the first line"),
        ("a,b\n1,2\n1,red\n", r"line 3: found 'red' in column 'b', expected a number; leave the column out"),
        ("1,2\n1,red\n", r"line 2: found 'red' in column 1, expected a number"),
        ("a,b\n1,\n", r"line 2: found no value in column 'b', expected a number; drop or fill"),
        ("a;b\n1,5;2\n", r"line 2: found '1,5' in column 'a', expected a number; write a decimal point"),
        ("a,b\n", r"found no rows of numbers"),
        ("a,b\n1,2\n2,nan\n", r"found nan at sample 1, feature 1"),
        ("\x00\xff\xfe", r"cannot be read|found no rows"),
    ],
)
def test_what_is_no_table_of_numbers(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(KanCompileError, match=said):
        load_calibration(str(path))


def test_targets_that_there_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", labelled(), HEADER)
    with pytest.raises(KanCompileError, match=r"found no column 'kind', expected one of kind of, f0.*and 1 more"):
        open_data(path, target_columns=["kind"])
    with pytest.raises(KanCompileError, match=r"found no column '7', expected one of"):
        open_data(path, target_columns=["7"])
    bare = write(tmp_path / "bare.csv", labelled(), None)
    with pytest.raises(
        KanCompileError, match=r"found no column 'f0', expected a number of 0 ... 6, as the file has no header"
    ):
        open_data(bare, target_columns=["f0"])
    with pytest.raises(KanCompileError, match=r"found 2 columns 'f0', expected one; name it by number"):
        read_table(Path(write(tmp_path / "twice.csv", X[:, :2], ["f0", "f0"])), ["f0"])
    with pytest.raises(KanCompileError, match=r"found no column beside the target"):
        read_table(Path(write(tmp_path / "one.csv", X[:, :1], ["f0"])), ["f0"])
    with pytest.raises(
        KanCompileError, match=r"--target-column 'y': calibration is 'x.npz', expected a .csv or .tsv file"
    ):
        open_data("x.npz", target_columns=["y"])


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "train.csv", labelled(), HEADER), tmp_path / "out"
    values = write(tmp_path / "values.csv", np.hstack([X, OUTPUTS.double().numpy()]), [*NAMES, "y0", "y1", "y2"])
    np.save(tmp_path / "train.npy", X)
    factory = [FACTORY, "--factory-arg", FACTORY_ARGS]
    model = tmp_path / "nets.py"
    model.write_text("from tests.compiled_kan import make_model\n")
    spec = f"{model}:make_model"
    target = ["--target-column", "kind of"]
    options = ["--out", str(out), "--no-timing", "--json", "--max-drop", "20"]
    assert main(["compile", spec, "--calibration", path, *target, *options]) == 0
    assert json.loads(capsys.readouterr().out)["validation"]["metrics"]["float"]["accuracy"] == 100
    file = str(out / "model.onnx")
    assert main(["validate", file, "--against", spec, "--data", path, *target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["float"]["accuracy"] == 100
    columns = [option for name in ("y0", "y1", "y2") for option in ("--target-column", name)]
    assert main(["validate", file, "--against", spec, "--data", values, *columns, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["float"]["r2"] > 0.999
    judged = ["--data", path, "--calibration", str(tmp_path / "train.npy")]
    assert main(["diagnose", spec, *judged, *target, "--json"]) == 0  # labels are those of the table
    capsys.readouterr()
    assert main(["compile", *factory, "--calibration", path, "--out", str(out), "--force"]) == 2
    printed = capsys.readouterr().err
    assert "all 7 columns are inputs; --target-column NAME names labels" in printed
    assert "it takes samples of shape (6,)" in printed
    assert main(["compile", *factory, "--calibration", str(tmp_path / "train.npy"), *target, *options, "--force"]) == 2
    assert "--target-column 'kind of': --calibration is" in capsys.readouterr().err


@pytest.mark.needs("pandas")
def test_data_frames() -> None:
    import pandas as pd

    frame = pd.DataFrame(X, columns=NAMES)
    kinds = pd.Series(CLASSES, name="kind")
    samples = load_calibration((frame, kinds))
    np.testing.assert_array_equal(samples.inputs, X.astype(np.float32))
    np.testing.assert_array_equal(samples.targets, CLASSES)  # type: ignore[arg-type]
    mixed = frame.assign(f0=frame.f0.astype("Float64"), flag=CLASSES > 0)
    np.testing.assert_array_equal(load_calibration(mixed).inputs[:, :N_IN], X.astype(np.float32))
    compiled = kancompile.compile(make_model(), frame)
    assert compiled.validate((frame, kinds)).metrics["float"]["accuracy"] == 100
    assert next(iter(stream_batches(frame)))[0].shape == (60, N_IN)
    mixed.loc[3, "f0"] = pd.NA
    for bad, said in (
        (frame.assign(city="Bonn"), r"calibration: row 0: found 'Bonn' in column 'city', expected a number"),
        (mixed, r"calibration: row 3: found no value in column 'f0'"),
        ((frame, kinds.astype(str) + "x"), r"calibration labels: row 0: found '\dx' in column 'kind'"),
        (frame.assign(day=pd.Timestamp("2024-01-01")), r"row 0: found Timestamp.* in column 'day', expected a number"),
    ):
        with pytest.raises(KanCompileError, match=said):
            load_calibration(bad)


class Items(Dataset[Any]):
    """Samples one by one, sorted by class."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(X):
            raise IndexError(number)
        return torch.from_numpy(X[number]).float(), int(number >= 30)


@pytest.mark.slow
def test_data_sets() -> None:
    inputs = torch.from_numpy(X).float()
    whole = TensorDataset(inputs, torch.from_numpy(CLASSES))
    for source in (whole, DataLoader(whole, batch_size=7)):
        samples = load_calibration(source)
        assert torch.equal(samples.samples, inputs)
        np.testing.assert_array_equal(samples.targets, CLASSES)  # type: ignore[arg-type]
    assert load_calibration(TensorDataset(inputs)).targets is None
    samples = load_calibration(Items())
    assert torch.equal(samples.samples.sort(0).values, inputs.sort(0).values)
    few = load_calibration(Items(), max_samples=20)
    assert few.targets is not None
    assert 3 < few.targets.sum() < 17  # not the first of a sorted set
    assert torch.equal(few.samples, load_calibration(Items(), max_samples=20).samples)
    assert kancompile.compile(make_model(), Items()).validate(Items()).passed
