"""Compile one model in a process of its own and print seconds and memory as JSON.

``latency`` starts it as ``python -m benchmarks.compilation_cost MODEL.safetensors CALIBRATION.npy WIDTH WIDTH ...``: what
else a process did before would count in its peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import kancompile
from benchmarks.measured_models import MeasuredModel
from examples.zoo import efficient_kan
from kancompile.progress import quiet
from kancompile.runtimes.machine import available_cores

_MIB = 1 << 20


def measure_compilation(measured: MeasuredModel, widths: tuple[int, ...]) -> dict[str, Any]:
    """Compile on all cores in a child process.

    Returns:
        seconds, peak memory of the process, and memory before the compilation began, in MiB.

    Raises:
        SystemExit: the child failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(measured.model.state_dict(), folder / "model.safetensors")
        np.save(folder / "calibration.npy", measured.calibration.numpy())
        command = [sys.executable, "-m", "benchmarks.compilation_cost", str(folder / "model.safetensors")]
        command += [str(folder / "calibration.npy"), *map(str, widths)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"compilation of {measured.name} failed:\n{child.stderr}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in MiB.

    Linux keeps the peak of the parent in a child's ``ru_maxrss``, so its own figure for this address space comes first.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / _MIB if sys.platform == "darwin" else used / 1024


def main() -> None:
    weights, calibration, *widths = sys.argv[1:]
    torch.set_num_threads(available_cores())
    model = efficient_kan.build(tuple(map(int, widths)))
    model.load_state_dict(load_file(weights))
    samples = np.load(calibration, allow_pickle=False)
    before = peak_memory()
    start = time.perf_counter()
    with quiet():
        compiled = kancompile.compile(model, samples)
    seconds = time.perf_counter() - start
    found = {
        "samples": len(samples),
        "cores": available_cores(),
        "seconds": seconds,
        "stages": compiled.timings,
        "peak_mib": peak_memory(),
        "mib_before": before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
