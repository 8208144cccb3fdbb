"""Measure what a call of a file takes on this machine, and say where that is more than a recipe allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from kancompile.errors import KanCompileError
from kancompile.ir import Values, arrays_of
from kancompile.recipe import Recipe
from kancompile.runtimes import RuntimeModel, seconds_of

_ENOUGH_SECONDS, _MOST_CALLS, _FEWEST_CALLS = 0.2, 200, 5
_TOLERANCE = 1.1
"""A busy machine, and a profile that rounds, are allowed for."""


def call_seconds(model: bytes, x: Values, batch: int = 1) -> float:
    """Measure the median time of a call in one thread of ONNX Runtime, in seconds.

    Args:
        model: file that ONNX Runtime loads.
        x: samples ``[n, ...]``, repeated where a batch has more.
        batch: samples of the call.
    """
    session = RuntimeModel(model, threads=1)
    array = arrays_of(x[torch.arange(batch) % len(x)])
    once = min(seconds_of(lambda: session.run(array), 3))
    calls = max(_FEWEST_CALLS, min(_MOST_CALLS, int(_ENOUGH_SECONDS / max(once, 1e-9))))
    return statistics.median(seconds_of(lambda: session.run(array), calls))


def check_latency(measure: Callable[[], float], recipe: Recipe) -> float | None:
    """Compare the median time of a call with the recipe's budget, which the costs of a profile were chosen by.

    Returns:
        microseconds, ``None`` without a budget.

    Raises:
        KanCompileError: the file is slower than the budget by more than a tenth.
    """
    if recipe.max_latency_us is None:
        return None
    found = measure() * 1e6
    if found > _TOLERANCE * recipe.max_latency_us:
        raise KanCompileError(
            f"max_latency_us {recipe.max_latency_us:g}: the file takes {found:.4g} us a call on this machine, more than the "
            f"costs of profile {recipe.costs.name!r} say; measure this machine (kancompile profile --out FILE.toml, --profile "
            "FILE.toml), use a narrower model or allow more"
        )
    return found
