"""The line from a number to a verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kancompile.runtimes import RUNTIMES
from tests.fuzzing.networks.judging import ROWS, Verdict, judged
from tests.fuzzing.networks.layouts import network
from tests.saturation import adds_products_exactly

Drawn = dict[str, Any]
"""``network``, ``data``, ``recipe``, ``target`` and ``seed``: plain data that JSON holds."""


def verdict_on(drawn: Drawn) -> Verdict:
    """Build, compile and compare what was drawn; a target that does not run here is exchanged for ``ort-cpu``."""
    target = drawn["target"]
    runtime = RUNTIMES.get(target)
    recipe: dict[str, Any] = dict(drawn["recipe"])
    if runtime is not None and runtime.missing() is not None:
        target = "ort-cpu"
    if not adds_products_exactly() and recipe.get("cpu") in ("x86-vnni", "arm64"):
        recipe["cpu"] = "portable"  # sums of these saturate on other processors (docs/targets/ort-cpu.md)
    model = network(drawn["network"], drawn["seed"])
    data, fresh = inputs(drawn, None, 0), inputs(drawn, ROWS, 1)
    with torch.no_grad():
        if not all(torch.isfinite(part).all() for part in _outputs(model, data)):
            return Verdict("refused", "the model's own outputs are not finite")
    return judged(model, data, fresh, recipe, target)


def inputs(drawn: Drawn, n: int | None, again: int) -> dict[str, np.ndarray]:
    """Make the inputs of a network by name."""
    spec, about = drawn["network"], drawn["data"]
    x = samples(about, tuple(spec["shape"]), n, again)
    if spec["second"] is None:
        return {"x": x}
    if spec["second"] == "ids":
        rng = np.random.default_rng([about["seed"], again, 7])
        return {"x": x, "t": rng.integers(0, 7, (len(x), spec["second_size"]))}
    return {"x": x, "t": samples(about | {"seed": about["seed"] + 5000}, (spec["second_size"],), len(x), again)}


def _outputs(model: torch.nn.Module, rows: dict[str, np.ndarray]) -> list[torch.Tensor]:
    found = model(*(torch.from_numpy(part) for part in rows.values()))
    return [found] if isinstance(found, torch.Tensor) else list(found.values() if isinstance(found, dict) else found)


def samples(about: dict[str, Any], shape: tuple[int, ...], n: int | None = None, again: int = 0) -> np.ndarray:
    """Make samples ``[n, *shape]``; ``again`` draws others of the same kind."""
    rng = np.random.default_rng([about["seed"], again])
    n = about["samples"] if n is None else n
    x = rng.standard_normal((n, *shape))
    kind = about["kind"]
    if kind == "uniform":
        x = rng.uniform(-1, 1, x.shape)
    elif kind == "heavy":
        x = rng.standard_t(1.5, x.shape)
    elif kind == "levels":
        x = rng.integers(-2, 3, x.shape) / 2
    elif kind == "constant feature":
        x[..., 0] = 0.5
    elif kind == "constant":
        x[:] = 0.25
    elif kind == "one outlier":
        x.flat[0] = 1e3
    return (x * about["scale"] + about["offset"]).astype(np.float32)
