"""Share the work of one compilation among processes that torchrun started; each ends with the bits that one alone has.

Every process runs the whole compilation in the same order. Where it evaluates chunks of calibration samples, process ``r`` of
``w`` takes chunks ``r``, ``r + w`` and so on, and all receive all results, in the order of the chunks. Sums are added in that
order too, in float64. What a process computes therefore does not depend on how many there are.

What travels are tensors in the form of safetensors files: nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from kancompile.errors import KanCompileError

if TYPE_CHECKING:  # torch takes seconds to load, and nothing but a shared compilation needs it here
    from torch import Tensor

Item = TypeVar("Item")

_ERROR = "error"
_PATIENCE = timedelta(hours=12)  # one that dies is noticed at once, by its closed connection

_place: ContextVar[tuple[int, int]] = ContextVar("kancompile_process_and_count", default=(0, 1))


def started_together() -> int:
    """Return how many processes torchrun started, 1 without it."""
    try:
        return int(os.environ["WORLD_SIZE"]) if {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() else 1
    except (KeyError, ValueError):
        return 1


def refuse_several(command: str) -> None:
    """Refuse a command that several processes would all do alike.

    Raises:
        KanCompileError: torchrun started more than one.
    """
    count = started_together()
    if count > 1:
        raise KanCompileError(
            f"{command}: found {count} processes that torchrun started, expected one; of all commands compile alone shares its "
            "work out, start this one without torchrun"
        )


def dealt(items: Iterable[Item], work: Callable[[Item], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield ``work(item)`` of every item in order; each is done by one process, whose result all others receive.

    Without other processes that is ``map``. ``work`` itself shares nothing out.

    Raises:
        KanCompileError: what ``work`` raised, in all processes; or another process has ended.
    """
    here, count = _place.get()
    if count == 1:
        yield from map(work, items)
        return
    waiting = iter(items)
    while turn := list(islice(waiting, count)):
        message: dict[str, Tensor] = {}
        if here < len(turn):
            token = _place.set((0, 1))
            try:
                message = {str(number): one for number, one in enumerate(work(turn[here]))}
            except KanCompileError as error:
                message = {_ERROR: bytes_as_tensor(str(error).encode())}
            finally:
                _place.reset(token)
        for received in _exchanged(message)[: len(turn)]:
            if _ERROR in received:
                raise KanCompileError(bytes(received[_ERROR].tolist()).decode())
            yield tuple(received[str(number)] for number in range(len(received)))


def sum_over_chunks(chunks: Iterable[Item], terms: Callable[[Item], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Add up what ``terms`` gives for each chunk, in the order of the chunks and in float64, whoever computes it.

    Args:
        chunks: at least one.
        terms: sums over a chunk, tensors of the same shapes for each.

    Raises:
        KanCompileError: as :func:`dealt`; there is no chunk.
    """
    totals: list[Tensor] = []
    for parts in dealt(chunks, terms):
        if totals:
            for total, part in zip(totals, parts, strict=True):
                total += part  # a float64 sum of terms of any precision
        else:
            totals = [part.double().clone() for part in parts]
    if not totals:
        raise KanCompileError("calibration: found 0 chunks of samples, expected at least 1; pass more data")
    return tuple(totals)


def process_count() -> int:
    """Return how many processes share the work out that is done now."""
    return _place.get()[1]


def is_mine(number: int) -> bool:
    """Whether this process computes item ``number`` of those that :func:`dealt` shares out."""
    here, count = _place.get()
    return number % count == here


@dataclass
class Team:
    """The processes of one command.

    Attributes:
        rank: of this process; 0 prints and writes.
        count: of all.
        store: where the first one to fail leaves its mark; ``None`` for a process alone, and before they meet.
    """

    rank: int = 0
    count: int = 1
    store: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process prints and writes what all have computed."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Share out what :func:`dealt` is called with inside; all processes enter and leave, or all fail."""
        if self.count == 1:
            yield
            return
        from torch import distributed

        with _peers():
            distributed.init_process_group(
                "gloo", store=self.store, rank=self.rank, world_size=self.count, timeout=_PATIENCE
            )
        token = _place.set((self.rank, self.count))
        try:
            yield
        finally:
            _place.reset(token)
            distributed.destroy_process_group()

    def check_equal(self, *contents: bytes | memoryview) -> None:
        """Compare, inside :meth:`together`, the files that the processes have made.

        Raises:
            KanCompileError: in all processes, that they differ.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).digest()
        found = _exchanged({"0": bytes_as_tensor(digest)})
        different = [number for number, one in enumerate(found) if one["0"].tolist() != found[0]["0"].tolist()]
        if different:
            raise KanCompileError(
                f"processes: found another file in process {different[0]} than in process 0, expected equal ones; run all on "
                "processors of one kind, with equal versions of PyTorch and equal data"
            )

    def speaks(self) -> bool:
        """Whether this process is the first one to report how it all ended badly; the others keep silent."""
        if self.store is None:
            return self.writes
        try:
            return int(self.store.add("kancompile: failed", 1)) == 1
        except RuntimeError:  # torchrun, which keeps the store, has ended, and another process may have spoken
            return False


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Meet the processes that torchrun started with this one; a single process is a team of its own.

    Inside, all but process 0 print nothing. After an exception, only the process that failed first goes on to print.
    """
    count = started_together()
    if count == 1:
        yield Team()
        return
    team, streams = Team(int(os.environ["RANK"]), count), (sys.stdout, sys.stderr)
    try:
        if not team.writes:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        from torch import distributed

        with _peers():
            team.store, _, _ = next(distributed.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]
        yield team
    except BaseException:
        if team.speaks():
            sys.stdout, sys.stderr = streams
        else:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        raise


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Turn what PyTorch raises about connections into an error."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise KanCompileError(
            "processes: lost the connection to another process, expected all to go on; it has ended, or torchrun was stopped "
            f"({str(error).splitlines()[0][:200]})"
        ) from error


def _exchanged(message: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Send tensors to all processes, and return those of every process."""
    import torch
    from safetensors.torch import load, save
    from torch import distributed

    content = bytes_as_tensor(save({name: one.cpu().contiguous().clone() for name, one in message.items()}))
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size())]
    with _peers():
        distributed.all_gather(sizes, torch.tensor([len(content)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        distributed.all_gather(parts, padded)
    return [load(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def bytes_as_tensor(content: bytes) -> Tensor:
    """Give bytes the form in which processes exchange them, uint8 ``[n]``."""
    import torch

    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
