"""Compare how weights are stored: bytes of the file, seconds to load, memory of a session, latency.

Run from the root of the repository::

    python -m benchmarks.storage --data FOLDER --checkpoint mnist_efficient_kan.safetensors

All widths compute as int8, so latency should not depend on the storage; what differs is the file and what ONNX Runtime does
with it once, when a session is created. Every file is loaded in a process of its own, as often as ``--loads`` says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import kancompile
from benchmarks.compilation_cost import peak_memory
from benchmarks.measured_models import MeasuredModel, add_model_arguments, mnist_model
from benchmarks.results_file import write_results
from kancompile.progress import quiet, say
from kancompile.recipe import STORAGES
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from kancompile.validation.benchmark import take_turns

BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        bits, storage: of its weights.
        bytes: of the file.
        load_ratio: time to create a session over that of int8 weights of the same bits (``storage="fastest"``), medians.
        session_mib: growth of a fresh process's peak memory while it creates a session, median.
        latency_ratio: by batch size, time of a call over that of ``storage="fastest"``.
    """

    bits: int
    storage: str
    bytes: int
    load_ratio: float
    session_mib: float
    latency_ratio: dict[int, float]


def load_once(path: Path) -> dict[str, float]:
    """Create a session in this process and say what it took."""
    import onnxruntime

    before, start = peak_memory(), time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {"seconds": time.perf_counter() - start, "mib": peak_memory() - before}


def measure_loads(files: dict[str, Path], loads: int) -> dict[str, list[dict[str, float]]]:
    """Load every file ``loads`` times, in turns, each time in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(loads):
        for name, path in files.items():
            command = [sys.executable, "-m", "benchmarks.storage", "--load-once", str(path)]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(child.stdout.splitlines()[-1]))
    return found


def measure_latency(
    contents: dict[str, bytes], x: Tensor, batch_sizes: Sequence[int], repeats: int
) -> dict[tuple[str, int], float]:
    """Time one call of every file in one thread, in turns: median seconds by storage and batch size."""
    sessions = {name: RuntimeModel(content, 1) for name, content in contents.items()}
    found = {}
    for batch in batch_sizes:
        array = x[:batch].numpy()
        calls = {name: partial(session.run, array) for name, session in sessions.items()}
        for timing in take_turns(calls, batch, 1, repeats, 3, {}):
            found[timing.candidate, batch] = timing.median
    return found


def measure(measured: MeasuredModel, bits: int, arguments: argparse.Namespace) -> list[Row]:
    """Compile for one width, store in every way, and measure."""
    with quiet():
        compiled = kancompile.compile(
            measured.model, measured.calibration, recipe={"weight_bits": bits, "method": "uniform", "lookup": "each"}
        )
    contents = {name: TARGETS["ort-cpu"].emit(compiled.program, {}, name) for name in STORAGES}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in contents}
        for name, path in files.items():
            path.write_bytes(contents[name])
        loads = measure_loads(files, arguments.loads)
    times = measure_latency(contents, measured.test, arguments.batch_sizes, arguments.repeats)
    seconds = {name: statistics.median(load["seconds"] for load in found) for name, found in loads.items()}
    return [
        Row(
            bits,
            name,
            len(contents[name]),
            seconds[name] / seconds["fastest"],
            statistics.median(load["mib"] for load in loads[name]),
            {batch: times[name, batch] / times["fastest", batch] for batch in arguments.batch_sizes},
        )
        for name in STORAGES
    ]


def table(rows: list[Row]) -> str:
    """Print for people."""
    batches = list(rows[0].latency_ratio)
    heads = "".join(f"  {f'batch {batch}':>9}" for batch in batches)
    lines = [f"bits  storage   {'bytes':>9}  {'load':>6}  session MiB{heads}   (load and latency relative to fastest)"]
    for row in rows:
        ratios = "".join(f"  {row.latency_ratio[batch]:>8.2f}x" for batch in batches)
        lines.append(
            f"{row.bits:>4}  {row.storage:<8}  {row.bytes:>9,}  {row.load_ratio:>5.2f}x  {row.session_mib:>11.1f}{ratios}"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--load-once"]:
        print(json.dumps(load_once(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--loads", type=int, default=9, help="sessions created from each file (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/storage.json"), help="default: %(default)s"
    )
    arguments = parser.parse_args()
    measured = mnist_model(arguments.data, arguments.checkpoint, arguments.epochs)
    rows = []
    for bits in BITS:
        say(f"{bits} bits ...")
        rows += measure(measured, bits, arguments)
    write_results(arguments.out, [asdict(row) for row in rows])
    print(table(rows))


if __name__ == "__main__":
    main()
