"""Keep other runtimes ready to be timed: each file is loaded once for a number of threads, and only calls are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError
from kancompile.progress import say
from kancompile.runtimes import ORT, RUNTIMES, ModelFile, Prepared, Runtime, name_of
from kancompile.validation.runtime_comparison import artifact_of, judge, lacking_for


def timed_runtimes(names: Sequence[str]) -> list[Runtime]:
    """Return runtimes to time by their names; ``"all"`` is all but ONNX Runtime itself and the emulated ones.

    Raises:
        KanCompileError: there is none of that name, or it is emulated.
    """
    found: dict[str, Runtime] = {}
    timed = {name: runtime for name, runtime in RUNTIMES.items() if not runtime.emulated}
    for name in names:
        if name == "all":
            found |= timed
        elif name in timed:
            found[name] = timed[name]
        elif name in RUNTIMES or any(key.startswith(f"{name}-") for key in RUNTIMES if key not in timed):
            raise KanCompileError(
                f"runtime {name!r} is emulated, so its speed says nothing; expected 'all' or some of {list(timed)!r}"
            )
        else:
            raise KanCompileError(f"runtime {name!r} is unknown, expected 'all' or some of {list(timed)!r}")
    found.pop(ORT.name, None)  # the compiled file in ONNX Runtime is always timed
    return list(found.values())


def candidate_name(runtime: Runtime) -> str:
    """Say in a table of timings which runtime ran the compiled model."""
    return f"compiled, {runtime.name}"


class TimedRuntimes:
    """Runtimes and the files of one model; a context, at whose end everything that was loaded is let go.

    Attributes:
        unavailable: candidates that are not timed, or not everywhere, and why.
    """

    def __init__(self, model: ModelFile, runtimes: Sequence[Runtime], samples: NDArray[np.float32]) -> None:
        """Choose what to time; nothing is loaded yet.

        Args:
            model: the ``.onnx`` file of the model; files of other targets are looked for beside it.
            runtimes: which.
            samples: inputs ``[n, ...]`` on which every runtime has to agree with ONNX Runtime before it is timed.

        Raises:
            KanCompileError: one is emulated, or the model is no path.
        """
        self.unavailable: dict[str, str] = {}
        self._runtimes: list[Runtime] = []
        self._prepared: dict[tuple[str, int], Prepared] = {}
        self._stack = ExitStack()
        self._samples = np.ascontiguousarray(samples, np.float32)
        if runtimes and isinstance(model, bytes):
            raise KanCompileError(
                f"{name_of(model)}: found bytes, expected a path, beside which runtimes find their files"
            )
        self._model = Path() if isinstance(model, bytes) else Path(model)
        for runtime in runtimes:
            if runtime.emulated:
                raise KanCompileError(f"runtime {runtime.name!r} is emulated, so its speed says nothing; leave it out")
            lacking = lacking_for(runtime, self._model)
            if lacking is None:
                self._runtimes.append(runtime)
            else:
                self.unavailable[candidate_name(runtime)] = lacking

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let everything go."""
        self._stack.close()

    def clocks(self, x: NDArray[np.float32], threads: int) -> dict[str, Callable[[int], list[float]]]:
        """Return for every candidate a function that makes a number of calls with all of ``x`` and gives each one's seconds.

        Args:
            x: inputs ``[n, ...]``.
            threads: of each runtime, 0 for one per core; a runtime that has only one thread is left out at other numbers.
        """
        x = np.ascontiguousarray(x, np.float32)
        found: dict[str, Callable[[int], list[float]]] = {}
        for runtime in list(self._runtimes):
            name = candidate_name(runtime)
            if threads != 1 and not runtime.has_threads:
                self.unavailable[name] = "in more than one thread, which this runtime cannot be told to use"
                continue
            try:
                prepared = self._prepare(runtime, threads)
            except KanCompileError as error:
                self.unavailable[name] = str(error)
                self._runtimes.remove(runtime)
                continue
            found[name] = partial(prepared.seconds, x)
        return found

    def _prepare(self, runtime: Runtime, threads: int) -> Prepared:
        """Load a file, once for a number of threads, and see that it computes what the model computes.

        Raises:
            KanCompileError: the runtime refuses the file, or its outputs lie off by more than it promises.
        """
        key = runtime.name, threads
        if key not in self._prepared:
            say(f"loading in {runtime.name} ...")
            file = artifact_of(runtime, self._model)
            prepared = self._stack.enter_context(runtime.prepare(file, threads))
            row = judge(runtime, file, prepared.run(self._samples), ORT.run(self._model, self._samples))
            if not row.passed:
                raise KanCompileError(
                    f"outputs of {row.file} lie up to {row.steps:.3g} steps off ONNX Runtime's, {row.tolerance} are allowed; "
                    f"compile both files from one model, and see: kancompile validate --runtime {runtime.name}"
                )
            self._prepared[key] = prepared
        return self._prepared[key]
