"""Hold a latency budget of half the unconstrained time: predicted by a profile, then measured beside the unconstrained file.

Run from the root of the repository, on one core::

    kancompile profile --out here.toml
    python -m benchmarks.latency_budget --profile here.toml --data FOLDER --checkpoint mnist_efficient_kan.safetensors --batch 64

Both files of MNIST efficient-KAN 784-64-10 are made for the least error: one without a budget, one with ``max_latency_us`` of a
share of what the first one's calls take. They are then timed interleaved, in one thread.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kancompile
from benchmarks.measured_models import mnist_model
from benchmarks.results_file import write_results
from kancompile.compiler.measured_latency import call_seconds
from kancompile.recipe import read_profile
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import take_turns
from kancompile.validation.error_measures import ErrorMeasure

SAMPLES = 1024
FREE, HELD = "without a budget", "within the budget"


@dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        bytes: of it.
        worst_db: SQNR of the worst output on samples that were not seen.
        predicted_us: of a call, by the profile.
        measured_us: of a call, median of interleaved calls.
        layers: what each layer got.
    """

    bytes: int
    worst_db: float
    predicted_us: float | None
    measured_us: float
    layers: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--checkpoint", type=Path, help="weights (.safetensors), else it is trained")
    parser.add_argument("--epochs", type=int, default=8, help="passes of training without --checkpoint")
    parser.add_argument("--profile", required=True, help="of this machine")
    parser.add_argument("--batch", type=int, default=64, help="samples of a call (default: %(default)s)")
    parser.add_argument("--method", default="uniform", help="of rounding; auto takes minutes (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of the unconstrained time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=40, help="blocks of 50 ms a file (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    measured = mnist_model(arguments.data, arguments.checkpoint, arguments.epochs)
    x = measured.test[-SAMPLES:]
    fresh, batch = measured.test[: 2 * SAMPLES], arguments.batch
    recipe: dict[str, Any] = {"for_batch": batch, "profile": str(arguments.profile), "goal_sqnr": None}
    recipe["method"] = arguments.method
    free = kancompile.compile(measured.model, x, recipe=recipe | {"optimize": "accuracy"})
    budget = arguments.share * 1e6 * call_seconds(free.model_bytes, fresh, batch)
    print(f"budget {budget:.4g} us at batch {batch}", flush=True)
    made = {FREE: free}
    try:
        made[HELD] = kancompile.compile(measured.model, x, recipe=recipe | {"max_latency_us": budget})
    except kancompile.KanCompileError as refused:
        print(refused)
    sessions = {name: RuntimeModel(one.model_bytes, 1) for name, one in made.items()}
    array = fresh[:batch].numpy()
    runs = {name: partial(session.run, array) for name, session in sessions.items()}
    unavailable: dict[str, str] = {}
    timings = {timing.candidate: timing for timing in take_turns(runs, batch, 1, arguments.repeats, 3, unavailable)}
    found: dict[str, Any] = {"batch": batch, "budget_us": budget, "load": os.getloadavg()[0]}
    found["profile"] = read_profile(arguments.profile).to_dict()
    for name, one in made.items():
        error = ErrorMeasure()
        with torch.no_grad():
            error.add(measured.model(fresh), one.program(fresh), name)
        (point,) = [point for point in one.manifest["allocation"]["points"] if point["chosen"]]
        time = timings[name].median * 1e6
        row = File(len(one.model_bytes), error.worst_db, point["predicted_us"], time, point["layers"])
        found[name] = asdict(row) | {"points": one.manifest["allocation"]["points"]}
        print(
            f"{name}: {row.bytes:,} bytes, worst output {row.worst_db:.1f} dB, {row.predicted_us or 0:.4g} us predicted, "
            f"{time:.4g} us measured: {row.layers}",
            flush=True,
        )
    if len(made) == 2:
        print(f"{found[HELD]['measured_us'] / budget - 1:+.1%} of the budget, load {found['load']:.1f}")
    if arguments.out is not None:
        write_results(arguments.out, found)


if __name__ == "__main__":
    main()
