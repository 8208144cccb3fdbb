"""Compile a model whose file takes more than 2 GB: ``python -m benchmarks.large_file --gigabytes 2.2``.

A table of embeddings of that size stands before two layers. Reported are the sizes of both files, seconds of the processor, the
peak of memory while compiling, saving and loading, and whether stock ONNX Runtime, which finds the second file by itself,
computes the bits of the simulation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import kancompile
from benchmarks.compilation_cost import peak_memory
from benchmarks.field_layers import GaussianKan
from benchmarks.results_file import write_results
from kancompile.progress import quiet

_WIDTH, _SAMPLES, _MOST_GIB = 64, 500, 12.0


class Embedded(nn.Module):
    """Rows of a large table, picked by integers, and two layers of functions of them."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(rows, _WIDTH)
        self.layers = nn.Sequential(GaussianKan(_WIDTH, 16, count=4), GaussianKan(16, 4, count=4))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``[b, 1]`` integers to ``[b, 4]``."""
        found: Tensor = self.layers(self.table(ids[:, 0]))
        return found


def measure(gigabytes: float, folder: Path) -> dict[str, Any]:
    """Compile, save and run."""
    rows = int(gigabytes * 1e9 / 4 / _WIDTH)
    ids = np.random.default_rng(0).integers(0, rows, (_SAMPLES, 1))
    started = time.process_time()
    with quiet():
        compiled = kancompile.compile(Embedded(rows).eval(), ids)
    seconds = time.process_time() - started
    path = compiled.save(folder / "large.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    said = session.run(None, {session.get_inputs()[0].name: ids})[0]
    return {
        "bytes": {one.name: one.stat().st_size for one in sorted(folder.iterdir())},
        "seconds": seconds,
        "peak_gib": peak_memory() / 1024,
        "equal": bool(np.array_equal(said, compiled.program(torch.from_numpy(ids)).numpy())),
        "kernels": [f"{row.node}: {row.operator}" for row in compiled.audit.rows],
    }


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_file.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.gigabytes, Path(folder))
    for name, what in found.items():
        print(f"{name}: {what}")
    write_results(options.out, found)
    if not found["equal"] or found["peak_gib"] > _MOST_GIB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
