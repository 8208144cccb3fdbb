"""Fit how the cost of a compilation grows with depth and with the number of weights.

Run from the root of the repository::

    python -m benchmarks.compilation_growth [--series depth] [--series weights]

Every model is compiled in a process of its own, on one thread; seconds are of the processor, so that other work on the machine
does not count, and memory is the peak above that before the compilation. What the smallest network of a series costs at any
size (imports, first calls) is measured with a network of one narrow layer and taken off before exponents are fitted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import kancompile
from benchmarks.compilation_cost import peak_memory
from benchmarks.field_layers import GaussianKan
from benchmarks.field_transformers import DeepChain
from benchmarks.results_file import write_results
from kancompile.progress import quiet, say

ALLOWED_EXPONENT = 1.1
SERIES: dict[str, tuple[str, ...]] = {
    "depth": ("8", "16", "32", "64"),  # layers of 64-64
    "weights": ("256x256", "512x512", "1024x1024", "4096x1024"),  # one layer of three functions
}
_SAMPLES = 512
_BASE = "base"


def _model(series: str, size: str) -> tuple[nn.Module, int]:
    """Build a network; give the number of its inputs, too."""
    if size == _BASE:
        return nn.Sequential(GaussianKan(8, 8, count=2)), 8
    if series == "depth":
        return DeepChain(64, int(size)), 64
    n_in, n_out = map(int, size.split("x"))
    return nn.Sequential(GaussianKan(n_in, n_out, count=2)), n_in


def _amount(series: str, size: str) -> float:
    return float(size) if series == "depth" else float(np.prod([int(part) for part in size.split("x")]))


def _compile(series: str, size: str) -> dict[str, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, n_in = _model(series, size)
    samples = torch.randn(_SAMPLES, n_in).numpy()
    before, start = peak_memory(), time.process_time()
    with quiet():
        compiled = kancompile.compile(model.eval(), samples)
    seconds, peak = time.process_time() - start, peak_memory()
    return {"seconds": seconds, "mib": peak - before, "peak_mib": peak, "bytes": float(len(compiled.model_bytes))}


def _in_a_process(series: str, size: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compilation_growth", "--one", series, size]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"compilation of {series} {size} failed:\n{child.stderr}")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def exponent(amounts: list[float], costs: list[float]) -> float:
    """Fit ``cost = c amount^p`` by least squares of logarithms; give ``p``."""
    slope, _ = np.polyfit(np.log(amounts), np.log(np.maximum(costs, 1e-3)), 1)
    return float(slope)


def measure(series: str) -> dict[str, Any]:
    """Compile the networks of a series and fit exponents over all, and between the last two."""
    base = _in_a_process(series, _BASE)
    found: dict[str, Any] = {"base": base, "sizes": {}}
    for size in SERIES[series]:
        say(f"{series} {size}: compiling ...")
        found["sizes"][size] = cost = _in_a_process(series, size)
        print(
            f"{series} {size}: {cost['seconds']:.1f} s, {cost['mib']:.0f} MiB above {cost['peak_mib'] - cost['mib']:.0f}"
        )
    amounts = [_amount(series, size) for size in SERIES[series]]
    for what in ("seconds", "mib"):
        costs = [cost[what] - base[what] for cost in found["sizes"].values()]
        found[f"exponent_of_{what}"] = exponent(amounts, costs)
        found[f"last_exponent_of_{what}"] = exponent(amounts[-2:], costs[-2:])
        verdict = "met" if found[f"exponent_of_{what}"] <= ALLOWED_EXPONENT else "missed"
        print(
            f"{series}: {what} grow with exponent {found[f'exponent_of_{what}']:.2f}, between the last two "
            f"{found[f'last_exponent_of_{what}']:.2f}; {ALLOWED_EXPONENT} {verdict}"
        )
    return found


def main() -> None:
    """Measure the chosen series and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", action="append", choices=SERIES, help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compilation_growth.json"))
    parser.add_argument("--one", nargs=2, metavar=("SERIES", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_compile(*arguments.one)))
        return
    results = {}
    for series in arguments.series or SERIES:
        results[series] = measure(series)
        write_results(arguments.out, results)


if __name__ == "__main__":
    main()
