"""Measure what a second process saves: processor seconds of the busiest process, of one and of two.

Run from the root of the repository::

    OMP_NUM_THREADS=1 python -m benchmarks.two_processes --out two_processes.json

A Chebyshev network of 784-64-10 is calibrated and rounded on samples of the size of MNIST's images, four fifths of them zeros,
and so is one of four layers side by side, each of a quarter of the inputs, behind which a layer joins them. Capturing and writing
the file, which every process does alone, are left out. Seconds are those of the processor, so that other work on the machine
counts little; integers of all runs are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.results_file import write_results
from examples.zoo import chebyshev_kan
from kancompile.compiler import prepare_model
from kancompile.data import load_calibration
from kancompile.processes import joined
from kancompile.progress import quiet
from kancompile.recipe import read_recipe

SIZES, SAMPLES = (784, 64, 10), 8192
METHODS = ("uniform", "gptq")
SLOW_METHODS = ("gptq", "adaround")


class SideBySide(nn.Module):
    """Layers that read a quarter of the inputs each, and one that reads what all of them give."""

    def __init__(self) -> None:
        super().__init__()
        self.quarters = nn.ModuleList(chebyshev_kan.build((SIZES[0] // 4, 32), seed=number) for number in range(4))
        self.last = chebyshev_kan.build((128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 784]`` to ``[b, 10]``."""
        joined: Tensor = self.last(
            torch.cat([layer(part) for layer, part in zip(self.quarters, x.chunk(4, 1), strict=True)], dim=1)
        )
        return joined


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "784-64-10": (lambda: chebyshev_kan.build(SIZES), METHODS),
    "4 side by side": (SideBySide, SLOW_METHODS),
}


def measure(network: str, method: str, samples: int, folder: Path) -> None:
    """Lower the network in the processes that torchrun started, and write what each of them took."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = NETWORKS[network][0]().eval()
    x = torch.rand(samples, SIZES[0], generator=draw) * (torch.rand(samples, SIZES[0], generator=draw) < 0.2)
    recipe = read_recipe({"method": method, "weight_bits": 4, "calibration_samples": samples})
    with joined() as team, quiet():
        prepared = prepare_model(model, load_calibration(x, max_samples=samples), recipe)
        with team.together():
            before = time.process_time()
            program = prepared.lowering()(prepared.recipe)
            seconds = time.process_time() - before
        digest = hashlib.sha256()
        for layer in program.layers():
            for name, values in sorted(program.module(layer.contraction).state_dict().items()):
                digest.update(name.encode() + values.contiguous().numpy().tobytes())
        (folder / f"{team.rank}.json").write_text(json.dumps({"seconds": seconds, "integers": digest.hexdigest()}))


def run(network: str, method: str, count: int, samples: int) -> list[dict[str, str | float]]:
    """Start ``count`` processes and give what each has written."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        options = ["--network", network, "--measure", method, "--samples", str(samples), "--folder", folder]
        subprocess.run([sys.executable, *launcher, "-m", "benchmarks.two_processes", *options], check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--network", choices=NETWORKS, help="one of them instead of all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.network, arguments.measure, arguments.samples, arguments.folder)
        return
    rows = []
    print(
        "| network | method | samples | one process | busiest of two | ratio | integers |\n|---|---|---|---|---|---|---|"
    )
    chosen = [arguments.network] if arguments.network else list(NETWORKS)
    cases = [(name, method) for name in chosen for method in NETWORKS[name][1]]
    for network, method in cases:
        one, two = (run(network, method, count, arguments.samples) for count in (1, 2))
        alone, busiest = float(one[0]["seconds"]), max(float(found["seconds"]) for found in two)
        equal = len({found["integers"] for found in (*one, *two)}) == 1
        rows.append(
            {
                "network": network,
                "method": method,
                "samples": arguments.samples,
                "one": alone,
                "two": busiest,
                "equal": equal,
            }
        )
        print(
            f"| {network} | {method} | {arguments.samples:,} | {alone:.1f} s | {busiest:.1f} s | {busiest / alone:.2f} | "
            f"{'equal' if equal else 'DIFFERENT'} |",
            flush=True,
        )
    if arguments.out is not None:
        write_results(arguments.out, rows)


if __name__ == "__main__":
    main()
