"""Measure a compiled file beside the float model, in one run of interleaved calls, so that both meet the same machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data import evaluating, float32_by_default, in_float32
from kancompile.errors import KanCompileError, reason
from kancompile.ir import Values, arrays_of, first_of
from kancompile.progress import track
from kancompile.runtimes import ModelFile, Runtime, RuntimeModel, available_cores, describe_machine, name_of, seconds_of
from kancompile.validation.float_export import FloatExport
from kancompile.validation.runtime_timing import TimedRuntimes
from kancompile.validation.text_table import Printed

COMPILED = "compiled, ONNX Runtime"
FLOAT_EXPORT = "float export, ONNX Runtime"
EAGER = "PyTorch eager"
_JUDGED_SAMPLES = 256  # on which other runtimes must agree with ONNX Runtime
_BLOCK_SECONDS = 5e-2  # long against the clock, and against filling the caches that another candidate left cold


@dataclass(frozen=True)
class OwnClock:
    """A candidate that times its calls itself, such as one in another process; ``seconds(calls)`` gives every call's."""

    seconds: Callable[[int], list[float]]


Candidate = Callable[[], Any] | OwnClock


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of one candidate: median and percentiles over all single calls of all blocks."""

    candidate: str
    batch_size: int
    threads: int
    median: float
    p10: float
    p90: float
    p99: float
    blocks: int
    calls_per_block: int


@dataclass(frozen=True)
class Benchmark(Printed):
    """What a benchmark measured.

    Attributes:
        model: which file.
        timings: one for each candidate, batch size and thread count.
        unavailable: candidates that could not run, and why.
        machine: processor, cores, load and versions.
    """

    model: str
    timings: tuple[Timing, ...]
    unavailable: dict[str, str]
    machine: dict[str, Any]

    def __repr__(self) -> str:
        return self.table()

    def ratio(self, candidate: str, batch_size: int, threads: int) -> float:
        """Return how many times longer a candidate takes than the compiled file, by their medians."""
        found = {(t.candidate, t.batch_size, t.threads): t.median for t in self.timings}
        return found[candidate, batch_size, threads] / found[COMPILED, batch_size, threads]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, times in seconds."""
        timings = [asdict(t) | {"ratio": self.ratio(t.candidate, t.batch_size, t.threads)} for t in self.timings]
        return {
            "model": self.model,
            "timings": timings,
            "unavailable": self.unavailable,
            "machine": self.machine,
        }

    def table(self) -> str:
        """Print for people; the ratio says how many times longer than the compiled file."""
        width = max(len(t.candidate) for t in self.timings)
        lines = [
            self.model,
            (
                f"  {'batch':>5}  {'threads':>7}  {'candidate':<{width}}"
                f"  {'ratio':>8}  {'p50':>10}  {'p90':>10}  {'p99':>10}"
            ),
        ]
        for t in self.timings:
            times = "  ".join(f"{_duration(value):>10}" for value in (t.median, t.p90, t.p99))
            ratio = self.ratio(t.candidate, t.batch_size, t.threads)
            threads = "all" if t.threads == 0 else str(t.threads)
            lines.append(f"  {t.batch_size:>5}  {threads:>7}  {t.candidate:<{width}}  {ratio:>7.2f}x  {times}")
        lines += [f"  {candidate}: not measured, {reason}" for candidate, reason in self.unavailable.items()]
        described = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([*lines, f"  on {described}"])


@float32_by_default()
def benchmark(
    model: ModelFile,
    reference: nn.Module | ExportedProgram,
    batch_sizes: Sequence[int] = (1, 16, 256),
    threads: Sequence[int] = (1, 0),
    *,
    repeats: int = 30,
    warmup: int = 3,
    data: Values | None = None,
    seed: int = 0,
    others: Mapping[str, bytes] | None = None,
    unavailable: Mapping[str, str] | None = None,
    runtimes: Sequence[Runtime] = (),
) -> Benchmark:
    """Time a compiled file, the float export of its model in the same runtime, and the model in PyTorch.

    Candidates take turns in blocks of about 50 ms, in an order that rotates, so that a change of the machine's speed
    meets all of them. A float model that cannot be exported is listed as unavailable, with the reason.

    Args:
        model: path or bytes of the compiled ONNX file.
        reference: the float model.
        batch_sizes: samples in a call.
        threads: threads of each candidate, 0 for one per core.
        repeats: blocks measured of each candidate.
        warmup: blocks run before.
        data: inputs ``[n, *input_shape]``, repeated or cut to the batch sizes; seeded uniform values in -1 ... 1 if
            ``None``.
        seed: of those values.
        others: further ONNX files to time, by the name of the candidate.
        unavailable: candidates that are known not to run, and why.
        runtimes: other runtimes to time, each with the file of its target beside ``model``, which is then a path. One that
            is not installed, has no such file or returns something else than ONNX Runtime is listed as unavailable.

    Raises:
        KanCompileError: unreadable file, sizes and counts below their minimum, or an emulated runtime.
    """
    _check_counts(batch_sizes, threads, repeats, warmup)
    loaded = RuntimeModel(model)
    data = _checked_data(loaded, data, runtimes)
    shape = loaded.input_shape if data is None or isinstance(data, Tensor) else ()
    generator = torch.Generator().manual_seed(seed)
    unavailable = dict(unavailable or {})
    cells = [(batch, count) for count in threads for batch in batch_sizes]
    timings: list[Timing] = []
    machine = describe_machine()
    judged = first_of(_inputs(data, _JUDGED_SAMPLES, shape, torch.Generator().manual_seed(seed))).numpy()
    reference = in_float32(reference, shape if data is None else data)
    with evaluating(reference) as eager, TimedRuntimes(model, runtimes, judged) as timed:
        float_file = _export(reference, shape if data is None else data[:2], unavailable)
        for batch, count in track(cells, "benchmarking"):
            x = _inputs(data, batch, shape, generator)
            runnable = _candidates(model, float_file, others or {}, eager, x, count)
            for name, seconds in timed.clocks(first_of(x).numpy(), count).items():
                runnable[name] = OwnClock(seconds)
            with torch_threads(count), torch.no_grad():
                timings += take_turns(runnable, batch, count, repeats, warmup, unavailable)
    return Benchmark(name_of(model), tuple(timings), timed.unavailable | unavailable, machine)


def _check_counts(batch_sizes: Sequence[int], threads: Sequence[int], repeats: int, warmup: int) -> None:
    for name, values, least in (
        ("batch_sizes", batch_sizes, 1),
        ("threads", threads, 0),
        ("repeats", [repeats], 3),
        ("warmup", [warmup], 1),
    ):
        if not values or min(values) < least:
            raise KanCompileError(f"benchmark: {name} is {list(values)!r}, expected at least {least} each")


def _checked_data(model: RuntimeModel, data: Values | None, runtimes: Sequence[Runtime]) -> Values | None:
    """Give the data as the file reads them; without data, one input of real numbers and fixed dimensions must be all it reads."""
    if len(model.input_shapes) > 1 and runtimes:
        raise KanCompileError(
            f"{model.name}: found the inputs {list(model.input_shapes)!r}, expected one for other runtimes; leave them out"
        )
    if data is not None:
        return model.as_read(data, "data")
    if len(model.input_shapes) > 1 or not model.reads_reals:
        raise KanCompileError(
            f"{model.name}: found the inputs {list(model.input_shapes)!r}, expected data for several inputs or for integers; "
            "give --data FILE (data=...)"
        )
    if -1 in model.input_shape:
        raise KanCompileError(
            f"{model.name}: found open input dimensions {model.input_shape!r}, expected all but the batch fixed; give --data FILE"
        )
    return None


def _inputs(data: Values | None, batch: int, shape: tuple[int, ...], generator: torch.Generator) -> Values:
    if data is None:
        return torch.rand(batch, *shape, generator=generator) * 2 - 1
    return data[torch.arange(batch) % len(data)]


def _candidates(
    model: ModelFile,
    float_file: bytes | None,
    others: Mapping[str, bytes],
    eager: Callable[[Values], Any],
    x: Values,
    threads: int,
) -> dict[str, Candidate]:
    arrays = arrays_of(x)
    compiled = RuntimeModel(model, threads)
    found: dict[str, Candidate] = {COMPILED: lambda: compiled.run(arrays)}
    if float_file is not None:
        exported = RuntimeModel(float_file, threads)
        renamed = exported.renamed(arrays)
        found[FLOAT_EXPORT] = lambda: exported.run(renamed)
    for name, content in others.items():
        found[name] = partial(RuntimeModel(content, threads).run, arrays)
    found[EAGER] = lambda: eager(x)
    return found


def take_turns(
    runnable: Mapping[str, Candidate],
    batch: int,
    threads: int,
    repeats: int,
    warmup: int,
    unavailable: dict[str, str],
) -> list[Timing]:
    """Time candidates in blocks that alternate, in an order that rotates.

    Args:
        runnable: what to call, by the name of the candidate; those that fail are left out.
        batch, threads: what to note in the timings.
        repeats: blocks measured of each candidate.
        warmup: blocks run before.
        unavailable: collects why a candidate failed.
    """
    calls: dict[str, int] = {}
    remaining = dict(runnable)
    for name, run in runnable.items():
        try:
            once = min(_block(run, 1)[0] for _ in range(warmup))
        except Exception as error:  # the float candidates run user code and foreign kernels
            if name == COMPILED:
                raise
            unavailable[name] = f"batch {batch}: {type(error).__name__}: {reason(error)}"
            del remaining[name]
            continue
        calls[name] = max(1, round(_BLOCK_SECONDS / max(once, 1e-9)))
        for _ in range(warmup):
            _block(run, calls[name])
    names = list(remaining)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for offset in range(len(names)):
            name = names[(turn + offset) % len(names)]
            seconds[name] += _block(remaining[name], calls[name])
    return [_summary(name, batch, threads, seconds[name], calls[name]) for name in names]


def _block(run: Candidate, calls: int) -> list[float]:
    """Return the seconds of every call."""
    return run.seconds(calls) if isinstance(run, OwnClock) else seconds_of(run, calls)


def _summary(name: str, batch: int, threads: int, seconds: list[float], calls: int) -> Timing:
    low, high, highest = (float(value) for value in np.percentile(seconds, [10, 90, 99]))
    return Timing(name, batch, threads, statistics.median(seconds), low, high, highest, len(seconds) // calls, calls)


def _export(
    reference: nn.Module | ExportedProgram,
    example: Values | tuple[int, ...],
    unavailable: dict[str, str],
) -> bytes | None:
    try:
        content = FloatExport(reference, example).result()
        RuntimeModel(content)
        return content
    except KanCompileError as error:
        unavailable[FLOAT_EXPORT] = str(error)
    except Exception as error:  # kernels of a foreign runtime
        unavailable[FLOAT_EXPORT] = f"{type(error).__name__}: {reason(error)}"
    return None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run PyTorch with that many threads, 0 for one per core, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or available_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
