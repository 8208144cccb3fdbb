"""Atomic writing: complete files or none, whatever goes wrong and whenever."""

import os
import stat
from pathlib import Path

import pytest

from kancompile import atomic_write
from kancompile.atomic_write import check_destinations, write_atomically
from kancompile.errors import KanCompileError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_and_missing_folders_are_written_and_nothing_else(tmp_path: Path) -> None:
    a, b = tmp_path / "new" / "deep" / "a", tmp_path / "new" / "b"
    write_atomically({a: b"1", b: b"2"})
    assert (a.read_bytes(), b.read_bytes()) == (b"1", b"2")
    assert _names(tmp_path / "new") == ["b", "deep"]
    assert stat.S_IMODE(b.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_existing_files_stay_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    contents = {tmp_path / "a": b"1", tmp_path / "b": b"2"}
    with pytest.raises(KanCompileError, match=r"file exists.*--force"):
        write_atomically(contents)
    assert _names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"
    write_atomically(contents, force=True)
    assert (tmp_path / "b").read_bytes() == b"2"


def test_impossible_destinations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KanCompileError, match="found a folder, expected a file name"):
        check_destinations([tmp_path], force=True)
    with pytest.raises(KanCompileError, match="is a file, expected a folder"):
        check_destinations([tmp_path / "file" / "model.onnx"])
    check_destinations([tmp_path / "not" / "yet" / "model.onnx"])
    assert _names(tmp_path) == ["file"]


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # permission bits do not bind the superuser, so the refusal itself is simulated
    monkeypatch.setattr(atomic_write.tempfile, "mkstemp", refuse)
    with pytest.raises(KanCompileError, match=r"cannot write in .*Permission denied"):
        check_destinations([tmp_path / "model.onnx"])


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_nobody_can_write_to_is_refused() -> None:
    with pytest.raises(KanCompileError, match="cannot write in '/proc'"):
        check_destinations([Path("/proc/kancompile/model.onnx")])


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(atomic_write.os, "fsync", fail_second)
    with pytest.raises(KanCompileError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_atomically({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert _names(tmp_path) == []


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_between_two_names_never_leaves_half_a_pair(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def fail_second_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise failure
        real(source, target)

    monkeypatch.setattr(atomic_write.os, "replace", fail_second_once)
    with pytest.raises(KanCompileError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_atomically({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert _names(tmp_path) == ([] if isinstance(failure, OSError) else ["a", "b"])
