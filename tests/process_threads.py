"""Threads in place of processes: they exchange what :mod:`kancompile.processes` sends, without sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from torch import Tensor

from kancompile import processes

Result = TypeVar("Result")


def together(work: Callable[[], Result], count: int, monkeypatch: pytest.MonkeyPatch) -> list[Result | Exception]:
    """Do some work in ``count`` processes, and give what each returns or raises."""
    barrier, sent = threading.Barrier(count, timeout=30), dict[int, dict[str, Tensor]]()

    def exchanged(message: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        here, _ = processes._place.get()
        sent[here] = {name: one.clone() for name, one in message.items()}
        barrier.wait()
        received = [dict(sent[number]) for number in range(count)]
        barrier.wait()
        return received

    def one(number: int) -> Result | Exception:
        processes._place.set((number, count))  # every thread has a context of its own
        try:
            return work()
        except Exception as error:
            return error

    monkeypatch.setattr(processes, "_exchanged", exchanged)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
