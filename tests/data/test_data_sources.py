"""Data by name: files, folders of images, loaders; what is wrong with them is said before anything is computed."""

import json
from pathlib import Path

import numpy as np
import pytest

from kancompile.cli.main import main
from kancompile.data.calibration import load_calibration
from kancompile.data.data_sources import open_data
from kancompile.data.image_folder import ImageFolder
from kancompile.errors.exceptions import KanCompileError

CODE = """
import numpy as np
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.arange(60.0).reshape(20, 3) / 64
Y = torch.arange(20) % 2

loader = DataLoader(TensorDataset(X, Y), batch_size=8)
pair = (X, Y)
number = 3

def make_loader():
    return loader

def make_generator():
    for start in range(0, 20, 8):
        yield X[start:start + 8], Y[start:start + 8]

def breaks():
    yield X
    raise ValueError("disk is full")

def needs(root):
    return loader

def prepare(image):
    return np.asarray(image, np.float32).reshape(-1) / 255

def prepare_nothing(image):
    return image

def prepare_badly(image):
    raise ValueError("no such mode")

def keep_size(image):
    return np.asarray(image, np.float32)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["loader", "make_loader", "make_generator", "pair"])
def test_loaders_functions_and_pairs_are_read_alike(name: str, here: Path) -> None:
    read = load_calibration(open_data(f"project.py:{name}"))
    np.testing.assert_array_equal(read.inputs, np.arange(60, dtype=np.float32).reshape(20, 3) / 64)
    assert read.targets is not None
    np.testing.assert_array_equal(read.targets, np.arange(20) % 2)


def _images(folder: Path) -> dict[str, int]:
    """Write grey images whose value tells which they are; return the label of each value."""
    from PIL import Image

    labels = {}
    for number, (name, size) in enumerate((("cat", 70), ("dog", 5), ("ant", 9))):
        (folder / name).mkdir(parents=True)
        for index in range(size):
            value = number * 80 + index
            Image.fromarray(np.full((2, 3), value, np.uint8)).save(folder / name / f"{index}.png")
            labels[str(value)] = sorted(("cat", "dog", "ant")).index(name)
    return labels


@pytest.mark.needs("pillow")
def test_class_folders_give_labels_in_sorted_order_and_are_shuffled(here: Path) -> None:
    expected = _images(here / "images")
    folder = open_data("images", "project.py:prepare")
    assert isinstance(folder, ImageFolder)
    assert folder.classes == ("ant", "cat", "dog")
    first, again = load_calibration(folder), load_calibration(folder)
    assert len(folder) == len(first) == 84
    np.testing.assert_array_equal(first.inputs, again.inputs)
    assert first.targets is not None
    values = np.rint(first.inputs * 255).astype(int)
    assert (values == values[:, :1]).all()
    assert {str(value): int(label) for value, label in zip(values[:, 0], first.targets, strict=True)} == expected
    assert len(set(first.targets[:40])) == 3  # a prefix has met every class
    other = load_calibration(open_data("images", "project.py:prepare", seed=1))
    assert not np.array_equal(other.inputs, first.inputs)


@pytest.mark.needs("pillow")
def test_a_flat_folder_has_no_labels(here: Path) -> None:
    _images(here / "images")
    read = load_calibration(open_data("images/dog", "project.py:prepare"))
    assert read.targets is None
    assert read.inputs.shape == (5, 6)


@pytest.mark.needs("pillow")
def test_wrong_folders_are_refused(here: Path) -> None:
    _images(here / "images")
    from PIL import Image

    for transform, text in (
        (None, "found a folder and no --transform"),
        ("project.py:absent", "has no 'absent'; it has make_loader"),
        ("project.py:number", "found int, expected a function of a PIL image"),
        ("project.py:prepare_nothing", "the transform returned an image"),
        ("project.py:prepare_badly", r"the transform raised ValueError for \d+.png \(L, 3x2\): no such mode"),
    ):
        with pytest.raises(KanCompileError, match=text):
            list(open_data("images", transform))
    (here / "empty").mkdir()
    with pytest.raises(KanCompileError, match="found no images"):
        open_data("empty", "project.py:prepare")
    (here / "images" / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(KanCompileError, match=r"broken.png cannot be read as an image"):
        list(open_data("images", "project.py:prepare"))
    (here / "images" / "dog" / "broken.png").unlink()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(here / "images" / "dog" / "wide.png")
    with pytest.raises(KanCompileError, match="expected one shape; resize or crop"):
        list(open_data("images", "project.py:keep_size"))
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(here / "images" / "lonely.png")
    with pytest.raises(KanCompileError, match="found 1 images beside subfolders with images"):
        open_data("images", "project.py:prepare")


@pytest.mark.parametrize(
    ("spec", "transform", "text"),
    [
        ("absent.npz", None, "cannot be read, no such file here"),
        ("absent", None, "no such file or folder, expected an .npz, .npy, .csv or .tsv file, a folder of images"),
        ("project.py", None, "found a file with suffix '.py'"),
        ("project.py:absent", None, "has no 'absent'"),
        ("project.py:number", None, "found int, expected an iterable of batches"),
        ("project.py:needs", None, r"missing a required argument: 'root'; it takes \(root\)"),
        ("project.py:loader", "project.py:prepare", "expected a folder of images; leave it out"),
        ("project.py:breaks", None, "batch 1 raised ValueError: disk is full"),
    ],
)
def test_wrong_sources_are_refused(spec: str, transform: str | None, text: str, here: Path) -> None:
    with pytest.raises(KanCompileError, match=text):
        list(open_data(spec, transform))


@pytest.mark.needs("pillow")
def test_a_folder_of_images_compiles_and_validates(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _images(here / "images")
    (here / "nets.py").write_text(
        "import torch\nfrom tests.compiled_kan import make_model\ndef make():\n    return make_model()\n"
    )
    common = ["--transform", "project.py:prepare", "--json", "--quiet"]
    assert main(["compile", "nets.py:make", "--calibration", "images", "--out", "out", *common]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert main(["validate", "out/model.onnx", "--against", "nets.py:make", "--data", "images", *common]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_samples"] == 84
    assert result["drop"] is not None


def test_a_transform_without_images_is_refused_where_two_sources_are_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(here / "a.npz", x=np.zeros((40, 3), np.float32))
    (here / "nets.py").write_text(
        "import torch\nfrom tests.compiled_kan import make_model\ndef make():\n    return make_model()\n"
    )
    arguments = ["nets.py:make", "--calibration", "a.npz", "--data", "a.npz", "--transform", "project.py:prepare"]
    assert main(["diagnose", *arguments]) == 2
    assert "expected a folder of images; leave it out" in capsys.readouterr().err
