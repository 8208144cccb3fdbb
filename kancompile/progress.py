"""Show that long work moves on: a bar on a terminal, single lines in a log, nothing where quiet is wanted."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

Item = TypeVar("Item")

_SILENT_SECONDS = 1.0  # work that ends sooner shows nothing
_LINE_SECONDS = 10.0

_is_quiet: ContextVar[bool] = ContextVar("kancompile_is_quiet", default=False)


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Silence :func:`track` and :func:`say` inside a ``with`` block, in this thread or task only."""
    token = _is_quiet.set(enabled)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one line about the progress to the standard error stream, unless silenced."""
    if not _is_quiet.get():
        print(text, file=stream or sys.stderr, flush=True)


def track(
    items: Iterable[Item], description: str, total: int | None = None, stream: TextIO | None = None
) -> Iterator[Item]:
    """Yield ``items`` and show how many are done.

    On a terminal a tqdm bar, in a notebook with ipywidgets its widget; elsewhere
    a line now and then, for work of more than a second, and one at its end.

    Args:
        items: what to work on.
        description: what is done, such as ``"rounding weights"``.
        total: number of items where ``len`` does not tell.
        stream: where to show it; the standard error stream if ``None``.
    """
    stream = stream or sys.stderr
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _is_quiet.get():
        yield from items
    elif _has_widgets():
        from tqdm.notebook import tqdm as widget  # type: ignore[import-untyped, unused-ignore]

        yield from widget(items, description, total, delay=_SILENT_SECONDS, leave=False)
    elif stream.isatty():
        yield from tqdm(items, description, total, file=stream, delay=_SILENT_SECONDS, leave=False)
    else:
        yield from _lines(items, description, total, stream)


def _has_widgets() -> bool:
    """Whether this is a notebook that can show a bar; without ipywidgets tqdm would only complain."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell" and importlib.util.find_spec("ipywidgets") is not None


def _lines(items: Iterable[Item], description: str, total: int | None, stream: TextIO) -> Iterator[Item]:
    of = "" if total is None else f"/{total}"
    start = time.monotonic()
    due = start + _SILENT_SECONDS
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now >= due and done != total:
            print(f"{description}: {done}{of} ({now - start:.0f} s)", file=stream, flush=True)
            due = now + _LINE_SECONDS
    elapsed = time.monotonic() - start
    if elapsed >= _SILENT_SECONDS:
        print(f"{description}: {done}{of} done in {elapsed:.1f} s", file=stream, flush=True)


class Timings:
    """Seconds of every stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Do some work, add its seconds, and return its result."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result
