"""Change files at random for as long as asked, and keep what was found as JSON: ``python -m tests.fuzzing --seconds 600``.

Inputs are numbered, and each is drawn from its number, so that a run goes on where its log ends. What makes a reader refuse at a
place where it has not refused before becomes a file to change further. Every reader works in a process of its own, which may
crash or hang.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzzing.mutations import KINDS, Mutation, mutated
from tests.fuzzing.readers import CASES, Case, error_of, fault_in, limited_memory

_SLICE_SECONDS, _MOST_SECONDS, _SILENT_SECONDS = 20.0, 30, 300
_MOST_FILES, _MOST_BYTES, _MOST_FAILURES, _TOLD = 500, 1 << 20, 20, 60


@dataclass
class Progress:
    """What is known about a reader.

    Attributes:
        inputs: files that it was given, accepted and refused ones, and processor time that it took.
        places: where refusals came from, each once.
        failures: what it should not have done, with the number of the input and the file.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    places: list[str] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


class _TooLong(BaseException):
    """A reader that keeps busy; no reader can take it for a fault of its file."""


def drawn(name: str, number: int) -> tuple[random.Random, list[Mutation]]:
    """Draw the changes of an input."""
    chance = random.Random(f"{name} {number}")
    return chance, [
        Mutation(chance.choice(KINDS), chance.random(), chance.random(), chance.randrange(1 << 16))
        for _ in range(chance.choice((1, 1, 2, 3, 5)))
    ]


def fuzz(name: str, case: Case, folder: Path, progress: Progress, seconds: float) -> Iterator[Progress]:
    """Give a reader changed files, and yield what is known after every one and before what might be the last."""
    path, files, known = case.placed(folder), [case.valid()], set(progress.places)
    with limited_memory():
        case.read(path)
    until = time.process_time() + seconds
    while time.process_time() < until:
        started = time.process_time()
        chance, changes = drawn(name, progress.inputs)
        chosen = files[0] if chance.random() < 0.5 else chance.choice(files)
        content = mutated(chosen, changes, case.inside)[:_MOST_BYTES]
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        progress.inputs += 1
        yield progress
        signal.setitimer(signal.ITIMER_PROF, _MOST_SECONDS)
        try:
            with limited_memory():
                error = error_of(case, path)
            fault = None if error is None else fault_in(error, path)
        except _TooLong:
            error, fault = None, f"busy for more than {_MOST_SECONDS} s of processor time"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        progress.seconds += time.process_time() - started
        progress.accepted += error is None and fault is None
        progress.refused += error is not None and fault is None
        if fault is not None and len(progress.failures) < _MOST_FAILURES:
            progress.failures.append({"input": progress.inputs - 1, "fault": fault, "file": content.hex()[:20_000]})
        place = "accepted" if error is None else _place(error)
        if place not in known:
            known.add(place)
            progress.places.append(place)
            if len(files) < _MOST_FILES:
                files.append(content)
    yield progress


def _place(error: BaseException) -> str:
    """Name the lines that an error and its causes were raised at, and how their texts begin, as not all come from Python."""
    found = []
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)[-2:]
        lines = " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
        found.append(f"{type(cause).__name__} {lines} {re.sub('[^a-zA-Z ]', '', str(cause))[:_TOLD]}")
        cause = cause.__cause__
    return " < ".join(found)


def _slice(name: str, known: dict[str, Any], seconds: float, folder: str, out: Any) -> None:
    """Fuzz one reader in a process of its own; what is known goes through a pipe twice a second."""

    def stop(*_: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGPROF, stop)
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115 (for as long as the process lives)
    last = 0.0
    for progress in fuzz(name, CASES[name], Path(folder), Progress(**known), seconds):
        if time.time() > last + 0.5:
            out.send(asdict(progress))
            last = time.time()
    out.send(asdict(progress))
    out.close()


def _run(name: str, progress: Progress, seconds: float) -> Progress:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_slice, args=(name, asdict(progress), seconds, folder, send))
        process.start()
        send.close()
        while True:
            try:
                if not receive.poll(_SILENT_SECONDS):
                    break
                progress = Progress(**receive.recv())
            except EOFError:
                break
        process.join(5)
        if process.exitcode != 0:
            process.kill()
            content = (Path(folder) / CASES[name].name).read_bytes()
            ended = "hung" if process.exitcode is None else f"ended the process with {process.exitcode}"
            progress.inputs += 1_000  # the numbers that were not reported any more
            progress.failures.append({"input": None, "fault": ended, "file": content.hex()[:20_000]})
    return progress


def run(names: Sequence[str], seconds: float, most: int, log: Path) -> int:
    """Fuzz readers in turns, and count their failures.

    Args:
        names: of readers; all where there are none.
        seconds: of processor time for each, those of earlier runs with this log included.
        most: inputs for each, after which it is done.
        log: file of JSON, read and written.
    """
    known = json.loads(log.read_text()) if log.exists() else {}
    readers = {name: Progress(**known.get(name, {})) for name in names or CASES}
    left = [name for name, one in readers.items() if one.inputs < most and one.seconds < seconds]
    while left:
        for name in left:
            readers[name] = _run(name, readers[name], min(_SLICE_SECONDS, seconds - readers[name].seconds))
            known[name] = asdict(readers[name])
            log.write_text(json.dumps(known, indent=1) + "\n")
            one = readers[name]
            print(
                f"{name}: {one.inputs:,} inputs in {one.seconds:.0f} s, {one.refused:,} refused at {len(one.places)} places, "
                f"{len(one.failures)} failures",
                flush=True,
            )
        left = [name for name in left if readers[name].inputs < most and readers[name].seconds < seconds]
    for name, one in readers.items():
        for failure in one.failures:
            print(f"{name}, input {failure['input']}: {failure['fault']}")
    return sum(len(one.failures) for one in readers.values())
