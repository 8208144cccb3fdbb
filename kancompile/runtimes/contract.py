"""What ``kancompile validate --runtime`` and ``kancompile benchmark --runtime`` need to know of a runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError

Array = NDArray[np.float32]


class Prepared(Protocol):
    """A file that a runtime has loaded, so that calls cost what a call costs."""

    def run(self, x: Array) -> Array:
        """Map inputs ``[n, ...]`` of any number to outputs ``[n, ...]``, in as many calls as memory asks for."""
        ...

    def seconds(self, x: Array, calls: int) -> list[float]:
        """Return the seconds of every one of so many calls with all of ``x``, by a clock beside the runtime."""
        ...


@dataclass(frozen=True)
class Runtime:
    """A program that runs a compiled file.

    Attributes:
        name: how users call it.
        artifact: name of the target whose file it runs.
        missing: ``None`` where it can be used, else what is missing and the command that installs it.
        prepare: loads a file for a number of threads, 0 for one per core, and lets it go when the context ends.
        tolerance_steps: quantization steps that an output may lie off ONNX Runtime's; 0 asks for equal bits.
        emulated: whether its speed says nothing.
        has_threads: whether it can use more than one thread; ``prepare`` gets 1 where it cannot.
    """

    name: str
    artifact: str
    missing: Callable[[], str | None]
    prepare: Callable[[Path, int], AbstractContextManager[Prepared]]
    tolerance_steps: int
    emulated: bool = False
    has_threads: bool = False

    def run(self, model: Path, x: Array) -> Array:
        """Load a file, run it once in one thread on inputs ``[n, ...]`` and return its outputs ``[n, ...]``.

        Raises:
            KanCompileError: the runtime is missing, there are no inputs, or it refuses the file or the inputs.
        """
        reason = self.missing()
        if reason is not None:
            raise KanCompileError(f"runtime {self.name!r}: {reason}")
        if not len(x):
            raise KanCompileError(
                f"runtime {self.name!r}: found inputs of shape {x.shape!r}, expected at least one row"
            )
        with self.prepare(model, 1) as prepared:
            return prepared.run(x)


@dataclass(frozen=True)
class InProcess:
    """A loaded file that is called in this process.

    Attributes:
        call: one call of the runtime with all rows.
        rows_at_once: rows that one call of :meth:`run` gets at most.
    """

    call: Callable[[Array], Array]
    rows_at_once: Callable[[Array], int] = len

    def run(self, x: Array) -> Array:
        """Run in parts of :attr:`rows_at_once`."""
        step = self.rows_at_once(x)
        parts = [
            self.call(np.ascontiguousarray(x[first : first + step], np.float32)) for first in range(0, len(x), step)
        ]
        return np.concatenate(parts)

    def seconds(self, x: Array, calls: int) -> list[float]:
        """Time calls from Python, as its users make them."""
        return seconds_of(lambda: self.call(x), calls)


def seconds_of(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the seconds of every call; reading the clock costs some 50 ns of the microseconds that a call takes."""
    marks = [time.perf_counter()]
    for _ in range(calls):
        call()
        marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)]


def in_process(load: Callable[[Path, int], InProcess]) -> Callable[[Path, int], AbstractContextManager[Prepared]]:
    """Make ``prepare`` of a function that loads a file and needs nothing undone."""

    @contextmanager
    def prepare(model: Path, threads: int) -> Iterator[Prepared]:
        yield load(model, threads)

    return prepare


def bounded_rows(values: int) -> Callable[[Array], int]:
    """Return a function that gives the rows whose values stay below a number, at least one."""
    return lambda x: max(1, values // max(1, x[0].size))


def available() -> str | None:
    """Say that a runtime of kancompile's own requirements is never missing."""
    return None
