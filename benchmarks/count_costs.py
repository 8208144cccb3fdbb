"""Write a cost profile of a processor that this machine has not, by instructions counted in QEMU.

    python -m benchmarks.count_costs --qemu usr/bin/qemu-aarch64 --out aarch64.toml

It takes the emulated system of ``python -m kancompile.runtimes.emulation``, a C compiler, and a QEMU of version 7 that loads
plugins: Debian's package qemu-user (``apt-get download qemu-user``, ``dpkg-deb -x``), not its static one.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.recipe import CostProfile, FunctionCosts, LookUpCosts
from kancompile.runtimes.emulation import ARM64, command
from kancompile.validation import costs_of, probes

PLUGIN, SESSION = (Path(__file__).with_name(name) for name in ("count_instructions.c", "counted_session.py"))
_PER_NANOSECOND = 4.0
"""Two instructions a cycle of 2 GHz; choices depend on ratios of costs, so not on this number."""


def main() -> None:
    """Count, and write the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", required=True, type=Path, help="qemu-aarch64 that loads plugins")
    parser.add_argument("--processor", choices=ARM64, default="dotprod", help="class of kernels (default dotprod)")
    parser.add_argument("--out", required=True, type=Path, help="profile to write; its name is the profile's")
    options = parser.parse_args()
    groups = list(probes())
    models = [(probe.model, probe.feeds) for probe in itertools.chain(*groups)]
    counted = iter(instructions(options.qemu, options.processor, models))
    taken = [[next(counted) / _PER_NANOSECOND for _ in group] for group in groups]
    costs = costs_of(groups, taken)
    profile = CostProfile(options.out.stem, LookUpCosts(**costs["look_up"]), FunctionCosts(**costs["functions"]))
    model = ARM64[options.processor].model.partition(",")[0]
    comments = (
        f"Estimates for 64-bit ARM with the kernels of class {options.processor!r} ({model}): instructions of one thread of\n"
        f"ONNX Runtime {metadata.version('onnxruntime')}, counted in QEMU by benchmarks/count_costs.py, {_PER_NANOSECOND:g} of "
        "them taken for a nanosecond.\n"
        "No clock saw them: waiting for memory, and what a processor does at the same time, are not in it, so that look-ups\n"
        "in large tables cost more than it says. kancompile profile on the device measures those."
    )
    options.out.write_text(profile.to_toml(comments))
    print(profile.to_toml(comments), end="")


def instructions(qemu: Path, processor: str, models: Sequence[tuple[bytes, Mapping[str, NDArray[Any]]]]) -> list[int]:
    """Count the instructions of one call of every model, bytes of ONNX files with what they read by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = folder / "count.so"
        subprocess.run(["cc", "-O2", "-fPIC", "-shared", "-o", library, PLUGIN], check=True)
        for number, (model, feeds) in enumerate(models):
            (folder / f"{number}.onnx").write_bytes(model)
            np.savez(folder / f"{number}.npz", **feeds)  # type: ignore[arg-type]
        python = [str(qemu), "-plugin", str(library), *command(ARM64[processor])[1:]]
        done = subprocess.run(
            [*python, str(SESSION), name, str(len(models))], stderr=subprocess.PIPE, text=True, check=False
        )
    marks = [int(count) for count in re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)]
    if done.returncode or len(marks) != 2 * len(models):
        sys.exit(f"{' '.join(python)} failed:\n{done.stderr[-2000:]}")
    return [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]


if __name__ == "__main__":
    main()
