"""Whatever fails or stops while files are written, what stands under their names is whole, or readers miss something."""

from __future__ import annotations

import errno
import io
import os
import pathlib
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.compiler.unfinished_writes import PREFIX
from kancompile.errors import KanCompileError

CALLS = ("link", "replace", "rename", "unlink", "fsync", "mkdir")
NAMES = ("model.onnx", "model.h", "model.manifest.json")
FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {
    "the disk is full": FULL,
    "the quota is used up": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "the folder became read-only": OSError(errno.EROFS, "Read-only file system"),
    "the device fails": OSError(errno.EIO, "Input/output error"),
}


class Faulty:
    """Lets a fault happen at one call of the file system, counted from 1 on, and at all behind it where it ``lasts``.

    A write is one as well: half of its bytes are written, and then it fails.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, fault: Callable[[], Any], lasts: bool = False) -> None:
        self.at, self.fault, self.lasts, self.calls = at, fault, lasts, 0
        for name in CALLS:
            patch.setattr(os, name, self.wrapped(getattr(os, name)))
        opened = io.open

        def open_file(*args: Any, **kwargs: Any) -> Any:
            file = opened(*args, **kwargs)
            if "b" in str(args[1:2]) and "x" in str(args[1:2]):
                whole = file.write
                return _Written(file, lambda data: self.write(file, whole, data))
            return file

        patch.setattr(pathlib.io, "open", open_file)

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return real(*args, **kwargs)

        return call

    def write(self, file: Any, whole: Callable[[bytes], int], data: bytes) -> int:
        half = len(data) // 2
        whole(data[:half])
        file.flush()
        self.count()
        return half + whole(data[half:])

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.lasts and self.calls > self.at):
            self.fault()


class _Written:
    """A file whose writes are counted."""

    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self.file, self.write, self.flush, self.fileno = file, write, file.flush, file.fileno

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture(autouse=True)
def _disks_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files need not reach the disk; that the calls fail is what counts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def contents(folder: Path, text: bytes) -> dict[Path, bytes]:
    return {folder / name: text for name in NAMES}


def standing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(PREFIX)}


def check_and_settle(folder: Path, is_there: bool, where: object) -> bytes | None:
    """Verify that nothing is half or mixed, and that the next run leaves one whole set, or nothing, and no left-overs."""
    found = standing(folder)
    assert set(found.values()) <= {b"old", b"new"}, where
    assert len(set(found.values())) <= 1, where
    assert len(found) == len(NAMES) or not is_there or "model.onnx" in found, where  # what is replaced is never absent
    assert "model.onnx" not in found or len(found) == len(NAMES) or is_there, where  # and never alone where it is new
    check_destinations([folder / "another"])
    settled = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(settled) in ([], sorted(NAMES)), where
    assert len(set(settled.values())) <= 1, where
    assert not is_there or settled, where
    return next(iter(settled.values()), None)


def each_call(tmp_path: Path, is_there: bool) -> Iterator[tuple[int, Path]]:
    for at in range(1, 60):
        folder = tmp_path / str(at)
        if is_there:
            write_atomically(contents(folder, b"old"))
        yield at, folder
    pytest.fail("there is no end of calls")


@pytest.mark.parametrize("is_there", [False, True], ids=["into a new folder", "over older files"])
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call(fault: str, lasts: bool, is_there: bool, tmp_path: Path) -> None:
    outcomes = set()

    def fail() -> None:
        raise FAULTS[fault]

    for at, folder in each_call(tmp_path, is_there):
        refused = None
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, at, fail, lasts)
            try:
                write_atomically(contents(folder, b"new"), force=is_there)
            except KanCompileError as error:
                refused = str(error)
        folder.mkdir(exist_ok=True)
        found = standing(folder)
        assert refused is None or "cannot be written" in refused or "cannot write in" in refused, refused
        assert refused is not None or found == dict.fromkeys(NAMES, b"new"), at
        if not lasts:  # then it is taken back at once
            assert found in ({}, dict.fromkeys(NAMES, b"old"), dict.fromkeys(NAMES, b"new")), at
        settled = check_and_settle(folder, is_there, (at, refused))
        assert refused is not None or settled == b"new", at
        outcomes.add(settled)
        if faulty.calls < at:
            break
    assert outcomes == ({b"old", b"new"} if is_there else {None, b"new"})
    assert at > 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with SIGKILL and fork")
@pytest.mark.parametrize("is_there", [False, True], ids=["into a new folder", "over older files"])
def test_a_kill_at_any_call_and_in_the_middle_of_a_write(is_there: bool, tmp_path: Path) -> None:
    outcomes = set()
    for at, folder in each_call(tmp_path, is_there):
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                Faulty(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                try:
                    write_atomically(contents(folder, b"new"), force=is_there)
                finally:
                    os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        folder.mkdir(exist_ok=True)
        before = standing(folder).get("model.onnx")
        settled = check_and_settle(folder, is_there, at)
        assert before != b"new" or settled == b"new", at
        outcomes.add(settled)
        if not was_killed:
            break
    assert outcomes == ({b"old", b"new"} if is_there else {None, b"new"})


@pytest.mark.parametrize("force", [False, True])
def test_names_that_no_file_can_have_are_refused_before_any_work(force: bool, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, words in {
        "d" * 300 + "/model.onnx": "File name too long",
        "n" * 235 + ".onnx": "File name too long",  # by its temporary name
        "\u00e9" * 130: "File name too long",
        "/".join(["d" * 200] * 25): "File name too long",
        "loop/model.onnx": "Too many levels of symbolic links",
        "a\0b/model.onnx": "null byte",
        "pipe": "found a device, pipe or socket",
        "socket": "found a device, pipe or socket",
    }.items():
        for write in (check_destinations, lambda paths, force: write_atomically(dict.fromkeys(paths, b"x"), force)):
            with pytest.raises(KanCompileError, match=words):
                write([tmp_path / name], force)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "pipe", "socket"]
