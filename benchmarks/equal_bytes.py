"""Set files whose bits and rows were allocated beside files of as many bytes whose layers all have the same bits.

Run from the root of the repository::

    python -m benchmarks.equal_bytes --out equal_bytes.json
    python -m benchmarks.equal_bytes --only digits --bits 3

For each of eight trained networks a file with uniform bits is compiled; its size is the budget of the allocation (``optimize =
"accuracy"``, ``max_bytes``). Errors are those of the worst output about its mean, on samples that neither training nor
calibration saw. Inputs are looked up one by one in both files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kancompile
from benchmarks.digit_models import build_seeded, load, train
from benchmarks.results_file import write_results
from benchmarks.small_models import MODELS, trained
from examples.zoo import chebyshev_kan, efficient_kan, fast_kan
from kancompile.progress import quiet
from kancompile.validation.error_measures import ErrorMeasure

CALIBRATED, GAIN_DB = 512, 3.0
Trained = tuple[nn.Module, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """Two files of one network.

    Attributes:
        model: how the table calls it.
        bits: of all weights in the uniform file.
        uniform_bytes, allocated_bytes: of the files.
        uniform_db, allocated_db: worst output on samples not seen.
        notes: what the allocation says.
    """

    model: str
    bits: int
    uniform_bytes: int
    uniform_db: float
    allocated_bytes: int
    allocated_db: float
    notes: tuple[str, ...]

    @property
    def gain_db(self) -> float:
        """What the allocation gains."""
        return self.allocated_db - self.uniform_db


def _small(name: str) -> Trained:
    model, x, fresh = trained(next(small for small in MODELS if small.name == name))
    return model, x[:CALIBRATED], fresh


def _digits(build: Callable[[], nn.Module]) -> Trained:
    digits, model = load((64,)), build_seeded(build)
    train(model, digits, epochs=8)
    return model, digits.x_train[:CALIBRATED], digits.x_test


SMALL = (
    "efficient-KAN 2-10-2",
    "efficient-KAN 12-32-2",
    "efficient-KAN 13-32-3",
    "FastKAN 12-32-2",
    "FastKAN 13-32-3",
)
NETWORKS: dict[str, Callable[[], Trained]] = {
    **{name: partial(_small, name) for name in SMALL},
    "digits efficient-KAN 64-64-10": partial(_digits, partial(efficient_kan.build, (64, 64, 10))),
    "digits FastKAN 64-32-10": partial(_digits, partial(fast_kan.build, (64, 32, 10))),
    "digits Chebyshev 64-32-10": partial(_digits, partial(chebyshev_kan.build, (64, 32, 10))),
}


def _worst(model: nn.Module, compiled: kancompile.CompiledModel, x: Tensor) -> float:
    measure = ErrorMeasure()
    with torch.no_grad():
        measure.add(model(x), compiled.program(x), "equal bytes")
    return measure.worst_db


def measure(name: str, bits: int) -> Row:
    """Train a network and compile it both ways."""
    model, x, fresh = NETWORKS[name]()
    plain: dict[str, Any] = {"lookup": "each", "metadata": "short"}
    with quiet():
        uniform = kancompile.compile(model, x, recipe=plain | {"weight_bits": bits})
        limit = len(uniform.model_bytes)
        allocated = kancompile.compile(model, x, recipe=plain | {"optimize": "accuracy", "max_bytes": limit})
    notes = tuple(note for note in allocated.manifest["notes"] if note.startswith("allocation:"))
    sizes = (limit, _worst(model, uniform, fresh)), (len(allocated.model_bytes), _worst(model, allocated, fresh))
    return Row(name, bits, *sizes[0], *sizes[1], notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="part of the names of networks")
    parser.add_argument("--bits", type=int, default=4, help="of all weights in the files that set the budgets")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    rows = []
    print("| network | uniform | worst output | allocated | worst output | gain |")
    print("|---|---|---|---|---|---|")
    for name in NETWORKS:
        if arguments.only not in name:
            continue
        row = measure(name, arguments.bits)
        rows.append(row)
        print(
            f"| {name} | {row.bits} bits, {row.uniform_bytes:,} bytes | {row.uniform_db:.1f} dB | "
            f"{row.allocated_bytes:,} bytes | {row.allocated_db:.1f} dB | {row.gain_db:+.1f} dB |",
            flush=True,
        )
        if arguments.out is not None:
            write_results(arguments.out, [asdict(row) | {"gain_db": row.gain_db} for row in rows])
    better, worse = (sum(row.gain_db >= GAIN_DB for row in rows), sum(row.gain_db < 0 for row in rows))
    print(f"{better} of {len(rows)} at least {GAIN_DB:g} dB better, {worse} worse")


if __name__ == "__main__":
    main()
