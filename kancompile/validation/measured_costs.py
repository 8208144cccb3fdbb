"""Measure what operators cost on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
from scipy.optimize import nnls  # type: ignore[import-untyped, unused-ignore]

from kancompile.errors import KanCompileError
from kancompile.progress import say, track
from kancompile.runtimes import seconds_of
from kancompile.validation.operator_probes import BESIDE, CALL, Probe, probes

_BLOCK_SECONDS = 5e-3
_LEAST = 1e-4
"""Nanoseconds that any work costs at least."""
_DIGITS = 3


def measure_costs(repeats: int) -> dict[str, dict[str, float]]:
    """Measure all costs of a profile in one thread of ONNX Runtime.

    All probes take turns, so that a change of the machine's speed meets all of them, and the median of a probe's calls counts.

    Args:
        repeats: blocks of about 5 ms that each probe gets.

    Returns:
        nanoseconds by cost, by section of the profile.

    Raises:
        KanCompileError: no repeats.
    """
    if repeats < 1:
        raise KanCompileError(f"measuring costs: repeats is {repeats}, expected at least 1")
    groups = list(probes())
    calls = [[prepared(probe) for probe in group] for group in groups]
    blocks = [[_calls_of_block(call) for call in group] for group in calls]
    seconds: list[list[list[float]]] = [[[] for _ in group] for group in groups]
    for _ in track(range(repeats), "measuring costs"):
        for group, block, found in zip(calls, blocks, seconds, strict=True):
            for call, count, own in zip(group, block, found, strict=True):
                call()  # fills the caches that another left cold
                own += seconds_of(call, count)
    medians = [[statistics.median(own) * 1e9 for own in found] for found in seconds]
    return costs_of(groups, medians)


def costs_of(groups: Sequence[Iterable[Probe]], amounts: Sequence[Iterable[float]]) -> dict[str, dict[str, float]]:
    """Find what a unit of each kind of work costs, given what every probe took: nanoseconds, or instructions.

    A probe takes the sum of its work and what any call of its group takes; relative errors count. Work
    that takes too little to be told apart is named in a line.
    """
    found: dict[str, dict[str, float]] = {}
    for group, taken in zip(groups, amounts, strict=True):
        own = list(group)
        names = list(dict.fromkeys(name for probe in own for name in probe.counts))
        any_call = [] if CALL in names else [1]
        work = np.array([[*(probe.counts.get(name, 0) for name in names), *any_call] for probe in own], np.float64)
        total = np.fromiter(taken, np.float64, len(own))
        costs, _ = nnls(work / total[:, None], np.ones(len(own)))
        section = found.setdefault(own[0].section, {})
        for name, cost in zip(names, costs, strict=False):  # the last one is what any call takes
            if name.startswith(BESIDE):
                continue
            if cost < _LEAST:
                say(f"note: {own[0].section}: {name} takes too little to be told apart, so {_LEAST:g} ns stand for it")
            section[name] = float(f"{max(cost, _LEAST):.{_DIGITS}g}")
    return found


def prepared(probe: Probe) -> Callable[[], Any]:
    """Load a probe's model; inputs and outputs stay where they are, as inside a network, but of calls as users make them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(probe.model, options, providers=["CPUExecutionProvider"])
    if CALL in probe.counts:
        return lambda: session.run(None, dict(probe.feeds))
    binding = session.io_binding()
    for name, value in probe.feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for name, (kind, shape) in probe.outputs.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), kind))
    return lambda: session.run_with_iobinding(binding)


def _calls_of_block(call: Callable[[], Any]) -> int:
    once = min(seconds_of(call, 3))
    return max(1, round(_BLOCK_SECONDS / max(once, 1e-9)))
