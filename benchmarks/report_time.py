"""Time ``kancompile report`` beside ``kancompile compile``, each a process of its own as a user starts them.

Run from the root of the repository::

    python -m benchmarks.report_time

Weights, calibration and test samples are seeded random numbers; a report on trained weights takes as long.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.capture_time import CHANNELS, SIDE, STRIDES
from benchmarks.results_file import write_results
from kancompile.progress import say
from kancompile.runtimes.machine import available_cores, describe_machine


@dataclass(frozen=True)
class Subject:
    """A network and what its report may take.

    Attributes:
        factory: of the model, with the arguments of ``--factory-arg``.
        shape: of a sample.
        calibration, test: numbers of samples.
        seconds: a report should take less.
    """

    factory: tuple[str, ...]
    shape: tuple[int, ...]
    calibration: int
    test: int
    seconds: float


SUBJECTS = {
    "efficient-KAN 784-64-10": Subject(
        ("examples.zoo.efficient_kan:build", "widths=784,64,10"), (784,), 1000, 10000, 20
    ),
    "KAGN, 10 convolutions": Subject(
        (
            "examples.zoo.kagn_conv:build",
            f"channels={','.join(map(str, CHANNELS))}",
            f"strides={','.join(map(str, STRIDES))}",
        ),
        (3, SIDE, SIDE),
        128,
        200,
        60,
    ),
}
LARGEST_PAGE = 3_000_000
_ANY_ERROR = ("--goal-sqnr", "-1000", "--min-sqnr", "-1000")


def _seconds(arguments: list[str], threads: int) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-m", "kancompile", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"kancompile {arguments[0]} failed:\n{child.stderr}")
    return seconds


def measure(subject: Subject, threads: int) -> dict[str, Any]:
    """Compile, then report, and give the seconds of both, their ratio, and the bytes of the page.

    Raises:
        SystemExit: a command failed.
    """
    generator = np.random.default_rng(0)
    factory = [part for argument in subject.factory[1:] for part in ("--factory-arg", argument)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {"calibration": subject.calibration, "data": subject.test}
        for file, count in data.items():
            np.save(folder / f"{file}.npy", generator.uniform(-1, 1, (count, *subject.shape)).astype(np.float32))
        calibration = ["--calibration", str(folder / "calibration.npy")]
        compile_seconds = _seconds(
            # random weights: what their error is does not matter
            [
                "compile",
                subject.factory[0],
                *factory,
                *calibration,
                "--out",
                str(folder / "compiled"),
                "--quiet",
                *_ANY_ERROR,
            ],
            threads,
        )
        model = folder / "compiled" / "model.onnx"
        report = ["report", str(model), "--against", subject.factory[0], *factory, *calibration, "--quiet"]
        report_seconds = _seconds([*report, "--data", str(folder / "data.npy")], threads)
        page = model.with_name("model.report.html").stat().st_size
    return {
        "threads": threads,
        "compile_seconds": compile_seconds,
        "report_seconds": report_seconds,
        "ratio": report_seconds / compile_seconds,
        "page_bytes": page,
    }


def main() -> None:
    """Measure both networks on one thread and on all, and say whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/report_time.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "networks": {}}
    for name, subject in SUBJECTS.items():
        results["networks"][name] = rows = []
        for threads in sorted({1, available_cores()}):
            say(f"{name}, {threads} threads ...")
            rows.append(found := measure(subject, threads))
            write_results(arguments.out, results)
            met = found["report_seconds"] < subject.seconds and found["page_bytes"] < LARGEST_PAGE
            print(
                f"{name}, {threads} threads: report {found['report_seconds']:.1f} s, {found['ratio']:.2f} times a compilation, "
                f"{found['page_bytes']:,} bytes; target of {subject.seconds:g} s and {LARGEST_PAGE:,} bytes "
                f"{'met' if met else 'missed'}"
            )


if __name__ == "__main__":
    main()
