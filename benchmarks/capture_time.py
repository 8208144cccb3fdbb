"""Time the capture of a convolutional KAN of ten layers beside torch.export alone, in turns, in one process.

Run from the root of the repository::

    python -m benchmarks.capture_time

Capture begins with ``torch.export`` of the same network, so the ratio says what the analysis adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results_file import write_results
from examples.zoo import kagn_conv, spline_conv
from kancompile.frontend.capture import capture
from kancompile.progress import quiet, say
from kancompile.runtimes.machine import describe_machine

LAYERS = 10
TARGET_SECONDS = 30.0
CHANNELS = (3, 16, 16, 16, 32, 32, 32, 32, 64, 64, 64)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1, 2, 1)
SIDE = 32


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def measure(model: nn.Module, repeats: int) -> dict[str, Any]:
    """Time both in turns, and check that all layers were found.

    Raises:
        SystemExit: the capture has not the layers of the network.
    """
    x = torch.rand(2, CHANNELS[0], SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = torch.export.Dim("batch", min=2)
    seconds: dict[str, list[float]] = {"capture": [], "export": []}
    with quiet(), torch.no_grad():
        for _ in range(repeats):
            elapsed, _ = _seconds(lambda: torch.export.export(model, (x,), dynamic_shapes=({0: batch},)))
            seconds["export"].append(elapsed)
            elapsed, program = _seconds(lambda: capture(model, x))
            seconds["capture"].append(elapsed)
    # groups and classifiers may be layers as well
    if len(program.layers()) < LAYERS:
        raise SystemExit(f"capture found {len(program.layers())} layers, expected at least {LAYERS}")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "layers": len(program.layers()),
        "capture_seconds": middle["capture"],
        "export_seconds": middle["export"],
        "ratio": middle["capture"] / middle["export"],
        "repeats": repeats,
        "machine": describe_machine(),
    }


def main() -> None:
    """Measure both networks and say whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/capture_time.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = {
        "KAGN": kagn_conv.build(CHANNELS, STRIDES),
        "B-splines": spline_conv.build(CHANNELS, STRIDES),
    }
    results = {}
    for name, model in networks.items():
        say(f"{name}: capturing ...")
        results[name] = found = measure(model.eval(), arguments.repeats)
        write_results(arguments.out, results)
        verdict = "met" if found["capture_seconds"] < TARGET_SECONDS else "missed"
        print(
            f"{name}, {found['layers']} layers: capture {found['capture_seconds']:.1f} s, {found['ratio']:.1f} times "
            f"torch.export alone; target of {TARGET_SECONDS:g} s {verdict}"
        )


if __name__ == "__main__":
    main()
