"""Work through numbered programs, each in turn from where the log ends, in processes that may crash or hang."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kancompile.compiler import preparation
from kancompile.errors import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import Program, Values, tensors_of
from tests.fuzzing.networks.drawing import drawn
from tests.fuzzing.networks.judging import Verdict
from tests.fuzzing.networks.one import Drawn, verdict_on
from tests.fuzzing.networks.shrinking import script, shrunk

_SECONDS_EACH, _WAITS_EACH, _PROGRAMS_EACH, _TOLD = 300.0, 3600.0, 48, 90
"""Of the processor, so that other work on the machine makes no program hang; by the clock, for those that wait for ever."""


class CapturedOnce:
    """Capture a network once for all recipes that are tried on the same samples; only the last one is kept."""

    def __init__(self) -> None:
        self.about = ""
        self.kept: tuple[Any, Program | KanCompileError] | None = None

    def __call__(self, model: Any, example: Values, **options: Any) -> Program:
        """Capture as ``frontend.capture`` does."""
        parts = tensors_of(example)
        key = (self.about, str(options), tuple((tuple(part.shape), part.numpy().tobytes()) for part in parts))
        if self.kept is None or self.kept[0] != key:
            try:
                self.kept = key, capture(model, example, **options)
            except KanCompileError as error:
                self.kept = key, error
        found = self.kept[1]
        if isinstance(found, KanCompileError):
            raise found
        return found


def _work(pipe: Any, other_end: Any) -> None:
    """Judge programs as they come; an exception is one of the generator's own parts."""
    once = CapturedOnce()
    preparation.capture = once  # type: ignore[assignment]
    other_end.close()  # so that the pipe ends where the parent does
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115 (for as long as the process lives)
    while True:
        try:
            given = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, _SECONDS_EACH)  # whose signal ends the process
        once.about, before = json.dumps([given.get("network"), given["seed"]]), time.process_time()
        try:
            found = verdict_on(given)
        except Exception as error:
            found = Verdict(f"generator: {type(error).__name__}", str(error)[:300])
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send((found.kind, found.detail, time.process_time() - before))


class Worker:
    """A process that judges programs; another one takes its place where it crashes, hangs or has judged many."""

    def __init__(self) -> None:
        self.process: Any = None
        self.judged = 0
        self.seconds = 0.0  # of the processor, all programs together

    def __call__(self, given: Drawn) -> Verdict:
        """Judge one program."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, theirs = context.Pipe()
            self.process, self.judged = context.Process(target=_work, args=(theirs, self.pipe), daemon=True), 0
            self.process.start()
            theirs.close()
        self.pipe.send(given)
        self.judged += 1
        try:
            if self.pipe.poll(_WAITS_EACH):
                kind, detail, seconds = self.pipe.recv()
                found = Verdict(kind, detail)
                self.seconds += seconds
            else:
                found = Verdict("hung", f"waits for {_WAITS_EACH:g} s")
        except EOFError:
            self.process.join(5)
            code = self.process.exitcode
            is_late = code == -signal.SIGPROF
            found = Verdict("hung", f"{_SECONDS_EACH:g} s") if is_late else Verdict("crashed", f"exit code {code}")
        if found.kind in ("hung", "crashed") or self.judged >= _PROGRAMS_EACH:
            self.stop()
        return found

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def run(programs: int, seconds: float, log: Path, shrink_seconds: float = 0.0, recipes: int = 1) -> int:
    """Judge programs and count those that are at fault.

    Args:
        programs: numbers end here; those in the log are not judged again.
        seconds: after which no further program begins.
        log: file of JSON, read and written: ``next``, ``recipes``, ``kinds``, ``refusals``, ``seconds``,
            ``processor_seconds``, and ``failures`` with what was drawn.
        shrink_seconds: time that making a failure smaller may take; its script stands beside the log.
        recipes: programs of every network, which is captured once for all of them.
    """
    known: dict[str, Any] = json.loads(log.read_text()) if log.exists() else {"recipes": recipes}
    known = {"next": 0, "kinds": {}, "refusals": {}, "seconds": 0.0, "processor_seconds": 0.0, "failures": []} | known
    if known.get("recipes", 1) != recipes:
        raise SystemExit(
            f"{log}: found {known.get('recipes', 1)} recipes each, not {recipes}; move it away to begin anew"
        )
    worker, until = Worker(), time.monotonic() + seconds
    while known["next"] < programs and time.monotonic() < until:
        number, started = known["next"], time.monotonic()
        given = drawn(*divmod(number, recipes))
        worked = worker.seconds
        found = worker(given)
        known["processor_seconds"] += worker.seconds - worked
        known["next"] += 1
        known["kinds"] = Counter(known["kinds"]) + Counter([found.kind])
        if found.kind == "refused":
            short = re.sub(r"[\d.e+-]+", "#", found.detail)[:_TOLD]
            known["refusals"].setdefault(short, []).append(number)
        if found.is_fault:
            less = shrunk(given, lambda one, kind=found.kind: worker(one).kind == kind, shrink_seconds)
            known["failures"].append({"number": number, "kind": found.kind, "detail": found.detail, "drawn": less})
            log.with_name(f"{log.stem}-{number}.py").write_text(script(less, found.kind))
        known["seconds"] += time.monotonic() - started
        log.write_text(json.dumps(known, indent=1) + "\n")
        print(
            f"{number}: {found.kind} ({time.monotonic() - started:.1f} s) {found.detail[:200] if found.is_fault else ''}",
            flush=True,
        )
    worker.stop()
    for failure in known["failures"]:
        print(f"program {failure['number']}: {failure['kind']}: {failure['detail'][:200]}")
    each = known["processor_seconds"] / max(1, known["next"])
    print(
        f"{known['next']:,} programs of {-(-known['next'] // recipes):,} networks in {known['seconds']:,.0f} s, "
        f"{each:.1f} s of the processor each: {dict(known['kinds'])}"
    )
    return len(known["failures"])
