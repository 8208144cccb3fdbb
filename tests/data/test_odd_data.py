"""Data of odd content: arrays, tensors, images and archives that are not what they seem."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kancompile.data.calibration import load_calibration
from kancompile.data.sample_arrays import to_array
from kancompile.errors.exceptions import KanCompileError
from tests.archives import declare


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _zipped(content: bytes, name: str = "x.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


_PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"
ARRAYS = {
    "archive.npy": (lambda: _zipped(_header(_PLAIN % "4, 3") + bytes(48)), "found an archive.*rename it to .npz"),
    "quote.npy": (lambda: _header("{'descr': '<f4', 'shape': (4, 3), '''}") + bytes(48), "found no NumPy data"),
    "long.npy": (lambda: _header(_PLAIN % ("9" * 30)) + bytes(48), "found no NumPy data"),
    "deep.npy": (lambda: _header("(" * 5000), "found no NumPy data"),
    "huge.npz": (lambda: _zipped(_header(_PLAIN % (1 << 44))), "asks for more memory than there is"),
    "text.npz": (lambda: _zipped(b"no array"), "found an entry that is no array"),
    "structured.npz": (lambda: _zipped(_header(_PLAIN.replace("'<f4'", "[('a', '<f4')]") % "2, 1") + bytes(8)), "found dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_calibration_data(name: str, tmp_path: Path) -> None:
    make, text = ARRAYS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(KanCompileError, match=rf"^calibration.*{text}"):
        load_calibration(tmp_path / name)


def test_archives_that_unpack_to_gigabytes_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(_zipped(_header(_PLAIN % f"{1 << 28}, 3") + bytes(1 << 20), method=zipfile.ZIP_DEFLATED))
    declare(path, "x.npy", 3 << 30)
    with pytest.raises(KanCompileError, match=r"bytes that unpack to 3,\d\d\d,\d\d\d,\d\d\d, expected at most"):
        load_calibration(path)
    # arrays that are not asked for do not count
    with zipfile.ZipFile(path, "a") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.ones((4, 3), np.float32))
        archive.writestr("good.npy", buffer.getvalue())
    assert len(load_calibration(path, key="good")) == 4


def test_compressed_data_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", x=np.zeros((4000, 1000)))
    assert (tmp_path / "data.npz").stat().st_size < 100_000
    assert len(load_calibration(tmp_path / "data.npz")) == 4000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, device="meta"), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, dtype=torch.complex64),
        [[1.0], [1.0, 2.0]],
    ],
    ids=["meta", "sparse", "complex", "ragged"],
)  # fmt: skip
def test_batches_of_odd_tensors(value: Any) -> None:
    with pytest.raises(KanCompileError, match=r"^data: found .*, expected"):
        to_array(value, "data")


def test_batches_of_small_floats_are_read() -> None:
    for kind in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert to_array(torch.ones(2, 2).to(kind), "data").dtype == np.float32


class Unreadable:
    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise KeyError("no such column")


def test_objects_that_are_no_arrays() -> None:
    with pytest.raises(KanCompileError, match=r"^data: found a value that is not an array"):
        to_array(Unreadable(), "data")


IMAGES = {
    "bomb.png": None,
    "bad.ppm": b"P6\n8\xf8\xc8 8\n255\n" + bytes(192),
    "short.tif": b"II*\x00\x08\x00\x00\x00\xff\xff",
    "short.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
}


@pytest.mark.needs("pillow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'kancompile[images]'")
    from kancompile.data.image_folder import ImageFolder

    content = IMAGES[name]
    if content is None:
        image.new("1", (20_000, 20_000)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    folder = ImageFolder(tmp_path, lambda picture: np.asarray(picture.resize((4, 4)), np.float32), "calibration")
    with pytest.raises(KanCompileError, match=rf"{name} cannot be read as an image"):
        load_calibration(folder)


@pytest.mark.needs("pillow")
def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'kancompile[images]'")
    from kancompile.data.image_folder import ImageFolder

    def refuse(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    # permission bits do not bind the superuser, so the refusal itself is simulated
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(KanCompileError, match="Permission denied"):
        ImageFolder(tmp_path, np.asarray, "calibration")
