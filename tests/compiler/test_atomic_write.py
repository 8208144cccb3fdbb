"""Atomic writing: complete files or none, whatever goes wrong and whenever."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kancompile.compiler import atomic_write
from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.compiler.folder_lock import locked
from kancompile.compiler.unfinished_writes import PREFIX, settle_left_overs
from kancompile.errors.exceptions import KanCompileError


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


# every call that changes a folder, in the order in which names are given
CALLS = ("link", "replace", "rename", "unlink")


class Failing:
    """Raises at one of the calls that change a folder, counted from 1 on."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, failure: BaseException, after: bool) -> None:
        self.at, self.failure, self.after, self.calls = at, failure, after, 0
        for name in CALLS:
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            self.calls += 1
            if self.calls == self.at and not self.after:
                raise self.failure
            real(*args, **kwargs)
            if self.calls == self.at:
                raise self.failure

        return call


def _pair(folder: Path, text: bytes) -> dict[Path, bytes]:
    return {folder / name: text for name in ("model.onnx", "model.manifest.json")}


@pytest.mark.parametrize("is_there", [False, True], ids=["into an empty folder", "over an older pair"])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("after", [False, True], ids=["in front of a call", "behind it"])
def test_a_failure_between_two_names_never_leaves_half_a_pair(
    is_there: bool, failure: BaseException, after: bool, tmp_path: Path
) -> None:
    before = _pair(tmp_path, b"old") if is_there else {}
    outcomes = set()
    for at in range(1, 40):
        for path in tmp_path.iterdir():
            path.unlink()
        write_atomically(before)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, at, failure, after)
            with contextlib.suppress(KanCompileError, KeyboardInterrupt):
                write_atomically(_pair(tmp_path, b"new"), force=True)
        found = {path: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(PREFIX)}
        assert found in (before, _pair(tmp_path, b"new")), at
        outcomes.add(tuple(found.values()))
        check_destinations([], force=True)
        write_atomically(_pair(tmp_path, b"next"), force=True)
        assert _names(tmp_path) == ["model.manifest.json", "model.onnx"], at
        if failing.calls < at:
            break
    else:
        pytest.fail("there is no end of calls")
    assert (b"new", b"new") in outcomes
    # where a link fails a file system may have none, and a name is given otherwise
    assert len(outcomes) == (1 if not is_there and not after and isinstance(failure, OSError) else 2)
    assert at > 4


def _killed(folder: Path, at: int) -> bool:
    """Write three files in a process that is killed in front of one of its calls; say whether it was."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    calls = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    try:
        for name in ("link", "replace", "rename", "unlink", "fsync"):
            setattr(os, name, wrapped(getattr(os, name)))
        write_atomically(
            {folder / name: b"new" for name in ("model.onnx", "model.h", "model.manifest.json")}, force=True
        )
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL and fork")
@pytest.mark.parametrize("is_there", [False, True], ids=["into an empty folder", "over older files"])
def test_a_kill_leaves_no_mixture_and_the_next_run_settles_it(is_there: bool, tmp_path: Path) -> None:
    names = ["model.h", "model.manifest.json", "model.onnx"]
    texts = set()
    for at in range(1, 40):
        folder = tmp_path / str(at)
        folder.mkdir()
        if is_there:
            write_atomically({folder / name: b"old" for name in reversed(names)})
        was_killed = _killed(folder, at)
        found = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
        assert len(set(found.values())) <= 1, (at, found)
        if "model.onnx" in found and not is_there:
            assert len(found) == 3, at  # a new file never stands without those that belong to it
        assert not is_there or "model.onnx" in found, at  # and one that is replaced is never absent
        # the next run, refused or not, completes the set or takes it back
        with pytest.raises(KanCompileError, match="exists") if is_there else contextlib.nullcontext():
            check_destinations([folder / "model.onnx"], force=not is_there)
        assert _names(folder) in ([], names), at
        settled = {path.read_bytes() for path in folder.iterdir()}
        assert len(settled) <= 1, at
        texts |= settled
        if found.get("model.onnx") == b"new":
            assert settled == {b"new"}
        if not was_killed:
            break
    else:
        pytest.fail("there is no end of calls")
    assert texts == ({b"old", b"new"} if is_there else {b"new"})


def test_what_stands_under_a_name_now_is_not_touched_by_settling(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"mine")
    (tmp_path / "model.manifest.json").write_bytes(b"mine")
    for name, text in (
        ("first.model.onnx", b"new"),
        ("new.model.manifest.json", b"new"),
        ("old.model.manifest.json", b"old"),
    ):
        (tmp_path / f"{PREFIX}0123abcd.{name}").write_bytes(text)
    (tmp_path / f"{PREFIX}settings").write_bytes(b"mine")
    check_destinations([tmp_path / "other"])
    assert _names(tmp_path) == [f"{PREFIX}settings", "model.manifest.json", "model.onnx"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"mine"}


def test_files_of_a_run_that_lives_stay(tmp_path: Path) -> None:
    waiting = tmp_path / f"{PREFIX}0123abcd.first.model.onnx"
    waiting.write_bytes(b"new")
    with locked(tmp_path) as is_held:
        if not is_held:
            pytest.skip("no locks here")
        check_destinations([tmp_path / "other"])
        assert waiting.exists()
    # without locks, what is old is dead
    settle_left_overs(tmp_path, is_locked=False)
    assert waiting.exists()
    os.utime(waiting, (0, 0))
    settle_left_overs(tmp_path, is_locked=False)
    assert not waiting.exists()


def test_a_run_waits_for_another_one_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path) as is_held:
        if not is_held:
            pytest.skip("no locks here")
        with pytest.raises(KanCompileError, match="another run is writing there"), locked(tmp_path, wait=0.1):
            pass
    with locked(tmp_path, wait=0) as is_held:
        assert is_held


TWO = """
import sys, time
from pathlib import Path
from typing import Any
from kancompile.compiler.atomic_write import write_atomically
from kancompile.errors import KanCompileError

root, text, start = Path(sys.argv[1]), sys.argv[2].encode() * 100_000, float(sys.argv[3])
for number in range(40):
    while time.time() < start + 0.05 * number:
        pass
    folder = root / str(number)
    try:
        write_atomically({folder / "model.onnx": text, folder / "model.manifest.json": text})
        print(number)
    except KanCompileError as error:
        assert "exists" in str(error) or "another program has just written it" in str(error), error
"""


@pytest.mark.parametrize("has_locks", [True, False])
def test_of_two_runs_without_force_one_is_refused(has_locks: bool, tmp_path: Path) -> None:
    script = TWO if has_locks else "from kancompile.compiler import folder_lock\nfolder_lock.fcntl = None\n" + TWO
    command = [sys.executable, "-c", script, str(tmp_path)]
    start = str(time.time() + 2)
    running = [
        subprocess.Popen(
            [*command, text, start], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent
        )
        for text in ("a", "b")
    ]
    won = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert not set(won[0]) & set(won[1])
    for folder in tmp_path.iterdir():
        found = {path.read_bytes() for path in folder.iterdir()}
        assert len(found) <= 1
        assert _names(folder) in ([], ["model.manifest.json", "model.onnx"])
    assert len(won[0]) + len(won[1]) == 40 or not has_locks


def test_links_count_as_files(tmp_path: Path) -> None:
    link = tmp_path / "model.onnx"
    link.symlink_to(tmp_path / "elsewhere")
    for write in (lambda: check_destinations([link]), lambda: write_atomically({link: b"x"})):
        with pytest.raises(KanCompileError, match="link exists, expected a new name"):
            write()
    with pytest.raises(KanCompileError, match="is a link to nothing, expected a folder"):
        check_destinations([link / "model.onnx"], force=True)
    assert link.is_symlink()
    write_atomically({link: b"x"}, force=True)
    assert (link.is_symlink(), link.read_bytes()) == (False, b"x")
    assert _names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("force", [False, True])
def test_file_systems_without_links_are_written_to(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    if force:
        write_atomically(_pair(tmp_path, b"old"))
    monkeypatch.setattr(os, "link", refuse)
    write_atomically(_pair(tmp_path, b"new"), force)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == _pair(tmp_path, b"new")
    for at in range(1, 30):
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, at, OSError(5, "Input/output error"), after=False)
            with contextlib.suppress(KanCompileError):
                write_atomically(_pair(tmp_path, b"newer"), force=True)
        found = {path: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(PREFIX)}
        assert found in (_pair(tmp_path, b"new"), _pair(tmp_path, b"newer"))
        write_atomically(_pair(tmp_path, b"new"), force=True)


def test_one_folder_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write_atomically({tmp_path / "folder" / "a": b"1", tmp_path / "link" / "b": b"2"})
    assert _names(tmp_path / "folder") == ["a", "b"]
