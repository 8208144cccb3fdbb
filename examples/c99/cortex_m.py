"""Build a model of target ``c99`` as firmware, run it on emulated Cortex-M cores, and say what it takes there.

    python -m examples.c99.cortex_m build/model.c --inputs inputs.npy --expected outputs.npy

Needs ``arm-none-eabi-gcc`` and ``qemu-system-arm`` (on Debian and Ubuntu: apt-get install gcc-arm-none-eabi
libnewlib-arm-none-eabi qemu-system-arm). QEMU counts instructions, not cycles: loads, branches and waiting for flash add to them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
_COMPILER, _SIZE, _EMULATOR = "arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm"
_STACK_BYTES = 4096
_SECONDS = 300


@dataclass(frozen=True)
class Core:
    """A core, and a board that QEMU has with it.

    Attributes:
        name: of the core.
        flags: of the compiler.
        machine: of QEMU.
        flash, ram: start and size.
    """

    name: str
    flags: tuple[str, ...]
    machine: str
    flash: tuple[int, int]
    ram: tuple[int, int]


CORES = (
    Core("cortex-m0", ("-mcpu=cortex-m0", "-mthumb"), "microbit", (0, 256 << 10), (0x20000000, 16 << 10)),
    Core(
        "cortex-m4",
        ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=soft"),
        "mps2-an386",
        (0, 4 << 20),
        (0x20000000, 4 << 20),
    ),
    Core(
        "cortex-m33",
        ("-mcpu=cortex-m33", "-mthumb", "-mfloat-abi=soft"),
        "mps2-an505",
        (0x10000000, 4 << 20),
        (0x38000000, 4 << 20),
    ),
)


@dataclass(frozen=True)
class Run:
    """What a core did.

    Attributes:
        outputs: float32 ``[n, outputs]``.
        flash: bytes of code and constants of the model alone, arm-none-eabi-size's text.
        firmware_flash: the same of all the firmware.
        state, stack: bytes of RAM that the model's state takes, and that the stack reached.
        instructions: for one call of ``kan_model_run``, the most over all samples.
    """

    outputs: NDArray[np.float32]
    flash: int
    firmware_flash: int
    state: int
    stack: int
    instructions: int


def missing() -> str | None:
    """Say which tool is missing and how to install it; ``None`` where all are there."""
    absent = [tool for tool in (_COMPILER, _SIZE, _EMULATOR) if shutil.which(tool) is None]
    if not absent:
        return None
    packages = "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"
    return f"{', '.join(absent)} not found; on Debian and Ubuntu: apt-get install {packages}"


def run(core: Core, model: bytes, header: bytes, inputs: NDArray[np.float32], optimization: str = "-O2") -> Run:
    """Build a model for a core and run it over all inputs, float32 ``[n, ...]``.

    Raises:
        RuntimeError: it does not build, or does not end as it should.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.c").write_bytes(model)
        (folder / "model.h").write_bytes(header)
        (folder / "inputs.bin").write_bytes(np.ascontiguousarray(inputs, np.float32).tobytes())
        flags = [*core.flags, optimization, "-std=gnu99", "-ffreestanding", "-Wall", "-Wextra", "-Werror", "-I."]
        _call([_COMPILER, *flags, "-std=c99", "-pedantic", "-c", "model.c", "-o", "model.o"], folder)
        _call([_COMPILER, *flags, "-c", str(HERE / "firmware.c"), "-o", "firmware.o"], folder)
        memory = {"FLASH_START": core.flash[0], "FLASH_SIZE": core.flash[1], "RAM_START": core.ram[0]}
        memory |= {"RAM_SIZE": core.ram[1], "STACK_SIZE": _STACK_BYTES}
        symbols = [f"-Wl,--defsym={key}={value}" for key, value in memory.items()]
        link = [*core.flags, "-nostartfiles", *symbols, "-T", str(HERE / "firmware.ld"), "--specs=nano.specs"]
        _call([_COMPILER, "firmware.o", "model.o", *link, "-o", "firmware.elf"], folder)
        printed = _call(
            [
                *(_EMULATOR, "-M", core.machine, "-kernel", "firmware.elf", "-nographic", "-monitor", "none"),
                *("-serial", "none", "-icount", "shift=0", "-semihosting-config", "enable=on,target=native"),
            ],
            folder,
        )
        found = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", printed, re.MULTILINE)}
        if found.get("samples") != len(inputs):
            raise RuntimeError(f"{core.name}: found {printed.strip()!r}, expected {len(inputs)} samples")
        outputs = np.frombuffer((folder / "outputs.bin").read_bytes(), np.float32).reshape(len(inputs), -1)
        return Run(
            outputs,
            _text(folder, "model.o"),
            _text(folder, "firmware.elf"),
            found["state"],
            found["stack"],
            found["instructions"],
        )


def _text(folder: Path, file: str) -> int:
    return int(_call([_SIZE, file], folder).splitlines()[1].split()[0])


def _call(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:1000]}")
    return done.stdout + done.stderr


def main() -> None:
    """Run a model on every core and print what it took."""
    parser = argparse.ArgumentParser(description="Run a model of target c99 on emulated Cortex-M cores.")
    parser.add_argument("model", type=Path, help="model.c; model.h must stand beside it")
    parser.add_argument("--inputs", type=Path, required=True, help=".npy of samples, float32 [n, ...]")
    parser.add_argument("--expected", type=Path, help=".npy of outputs, float32 [n, ...], to compare with")
    parser.add_argument("--optimization", default="-O2", help="of the compiler (default -O2)")
    options = parser.parse_args()
    problem = missing()
    if problem is not None:
        parser.exit(2, f"{problem}\n")
    inputs = np.load(options.inputs, allow_pickle=False).astype(np.float32)
    expected = None if options.expected is None else np.load(options.expected, allow_pickle=False)
    model, header = options.model.read_bytes(), options.model.with_suffix(".h").read_bytes()
    print(f"{'core':<11}{'flash':>9}{'state':>8}{'stack':>8}{'instructions':>14}  outputs")
    for core in CORES:
        try:
            done = run(core, model, header, inputs, options.optimization)
        except RuntimeError as error:
            print(f"{core.name:<11}{error}")
            continue
        verdict = "not compared"
        if expected is not None:
            differing = int((done.outputs != expected.reshape(done.outputs.shape)).sum())
            verdict = f"{differing} of {done.outputs.size} differ"
        print(f"{core.name:<11}{done.flash:>9,}{done.state:>8,}{done.stack:>8,}{done.instructions:>14,}  {verdict}")


if __name__ == "__main__":
    main()
