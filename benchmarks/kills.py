"""Kill whole compilations at random moments, and look at what they leave: ``python -m benchmarks.kills --kills 100``.

Each run is ``kancompile compile --force`` over the files of the one before it, in a process that is killed (SIGKILL) after a
share of the time that a whole run takes; every second time within its last twentieth, where files are written. What stands there
must be a whole old pair, a whole new one, or one of which a reader says that it does not belong together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results_file import write_results
from kancompile.cli import main
from kancompile.compiler import check_destinations, why_torn

_LAST_SHARE = 0.05


class Waves(nn.Module):
    """Two functions of each of three inputs, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 3]`` to ``[b, 2]``."""
        return torch.cat([torch.sin(2 * x), torch.cos(3 * x)], dim=1) @ self.weight.T


def compile_quietly(folder: Path, seed: int) -> int:
    """Compile into a folder, over what stands there; return the exit code."""
    return main(
        ["compile", "benchmarks.kills:Waves", "--calibration", str(folder / "train.npz"), "--out", str(folder / "out"),
         "--force", "--no-timing", "--quiet", "--seed", str(seed)]
    )  # fmt: skip


def killed(folder: Path, seed: int, seconds: float | None) -> tuple[bool, float]:
    """Compile in a process of its own, and kill it after so many seconds; say whether it was, and after how long it ended."""
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os._exit(compile_quietly(folder, seed))
        finally:
            os._exit(70)
    while seconds is None or time.monotonic() < started + seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.WEXITSTATUS(status):
                raise SystemExit(f"a compilation ended with {os.WEXITSTATUS(status)}")
            return False, time.monotonic() - started
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True, time.monotonic() - started


def left(folder: Path, seed: int) -> str:
    """Say what stands there."""
    model, manifest = folder / "model.onnx", folder / "model.manifest.json"
    if not model.is_file():
        return "nothing" if not manifest.is_file() else "BROKEN: a manifest alone"
    if not manifest.is_file():
        return "noticed: no manifest"
    said = json.loads(manifest.read_text())
    if why_torn(said, model.read_bytes()) is not None:
        return "noticed: not its manifest"
    return "new" if said["seed"] == seed else "old"


def run(kills: int, seed: int, log: Path) -> dict[str, Any]:
    """Kill so many compilations, from where the log ends.

    Args:
        kills: in all, those of the log included.
        seed: of the moments, together with the number of each run.
        log: file of JSON, read and written after every kill: ``runs``, ``left``, ``left_overs_after_the_next``, ``broken``.
    """
    known: dict[str, Any] = {"runs": 0, "left": {}, "left_overs_after_the_next": 0, "broken": 0}
    if log.exists():
        known |= json.loads(log.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "train.npz", x=np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32))
        compile_quietly(folder, 0)  # so that processes forked from here begin with everything imported
        whole = killed(folder, 0, None)[1]
        while sum(known["left"].values()) < kills:
            known["runs"] += 1
            number = known["runs"]
            chance = random.Random(f"{seed} {number}")
            share = chance.uniform(1 - _LAST_SHARE, 1) if number % 2 else chance.random()
            was_killed, seconds = killed(folder, number, whole * share)
            if not was_killed:
                whole = 0.7 * whole + 0.3 * seconds
                continue
            found = left(folder / "out", number)
            known["left"] = dict(Counter(known["left"]) + Counter([found]))
            known["broken"] += found.startswith("BROKEN")
            check_destinations([folder / "out" / "another"])  # as every run does first
            entries = {path.name for path in (folder / "out").iterdir()}
            known["left_overs_after_the_next"] += bool(entries - {"model.onnx", "model.manifest.json"})
            known["broken"] += left(folder / "out", number) not in ("old", "new")
            write_results(log, known)
    return known


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="kill compilations at random moments")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log",
        type=Path,
        default=Path("benchmarks/results/kills.json"),
        help="what was found; a run goes on where it ends",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options.kills, options.seed, options.log)
    print(json.dumps(found, indent=1))
    if found["broken"] or found["left_overs_after_the_next"]:
        raise SystemExit(1)
