"""ONNX Runtime on processors that this machine has not, in QEMU's user-mode emulation.

* ARM: the real aarch64 wheel in an aarch64 Python, in four classes of kernels (NEON, DotProd, i8mm, SVE).
* old x86: the wheel that is installed, on a processor without VNNI (Haswell) and on one without AVX (Nehalem).

``python -m kancompile.runtimes.emulation`` downloads what that takes to a folder of its own, with apt and pip, without root
and without touching what the machine has installed. It needs Debian 12, or a system whose apt serves arm64 too.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kancompile.errors import KanCompileError

INSTALL = "python -m kancompile.runtimes.emulation"
_SCRIPT = Path(__file__).with_name("emulated_session.py")
_WHEELS = ("onnxruntime", "numpy")
_WHEEL_NEEDS = ("flatbuffers", "packaging", "protobuf")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "any")


@dataclass(frozen=True)
class Processor:
    """An emulated processor.

    Attributes:
        name: how tables call it.
        machine: ``"aarch64"`` or ``"x86_64"``.
        model: QEMU's name of it.
        features: of ``/proc/cpuinfo``, where ONNX Runtime looks for the kernels it may use; empty on x86, which has an
            instruction for that.
        part: its number there.
    """

    name: str
    machine: str
    model: str
    features: str = ""
    part: str = ""


_ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
_DOTPROD = f"{_ARMV8} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_I8MM = f"{_DOTPROD} jscvt fcma sha3 sha512 asimdfhm dit uscat ilrcpc flagm sb dcpodp flagm2 frint i8mm bf16"
# features that the model lacks would end in an illegal instruction, so every class has its own list
ARM64: dict[str, Processor] = {
    "neon": Processor("neon", "aarch64", "cortex-a72", f"{_ARMV8} cpuid", "0xd08"),
    "dotprod": Processor("dotprod", "aarch64", "neoverse-n1", _DOTPROD, "0xd0c"),
    "i8mm": Processor("i8mm", "aarch64", "max,sve=off,sme=off", _I8MM, "0xd4d"),
    "sve": Processor("sve", "aarch64", "max,sme=off", _I8MM, "0xd4d"),
}
X86: dict[str, Processor] = {
    "haswell": Processor("haswell", "x86_64", "Haswell"),
    "nehalem": Processor("nehalem", "x86_64", "Nehalem"),
}


def cache_folder() -> Path:
    """Return where downloads are kept: ``$KANCOMPILE_CACHE``, or ``kancompile`` in the user's cache folder."""
    given = os.environ.get("KANCOMPILE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "kancompile"


def arm64_folder() -> Path:
    """Return where the emulated ARM system for the installed version of ONNX Runtime stands, or will stand."""
    return cache_folder() / f"arm64-onnxruntime-{metadata.version('onnxruntime')}"


def qemu(machine: str) -> Path | None:
    """Find the user-mode emulator of a machine: on the path, else where :func:`install` puts it."""
    name = f"qemu-{machine}-static"
    found = shutil.which(name) or shutil.which(f"qemu-{machine}")
    own = cache_folder() / "qemu" / "usr" / "bin" / name
    return Path(found) if found else own if own.is_file() else None


def missing(processor: Processor) -> str | None:
    """Say what is missing to emulate a processor, with the command that installs it; ``None`` where nothing is."""
    if platform.system() != "Linux":
        return f"QEMU's user-mode emulation needs Linux, this is {platform.system()}"
    if processor.machine == "x86_64" and platform.machine() != "x86_64":
        return f"the installed ONNX Runtime is for {platform.machine()}, an old x86 takes an x86-64 machine"
    if qemu(processor.machine) is None:
        return f"qemu-{processor.machine}-static is not installed: {INSTALL}"
    if processor.machine == "aarch64" and not (arm64_folder() / "site").is_dir():
        return f"{arm64_folder().name} is not installed: {INSTALL}"
    return None


def run_emulated(
    processor: Processor, model: Path, x: NDArray[np.float32], environment: Mapping[str, str] | None = None
) -> NDArray[np.float32]:
    """Run a model in ONNX Runtime on an emulated processor, in one thread.

    Args:
        processor: which one.
        model: ``.onnx`` or ``.ort`` file.
        x: inputs ``[n, ...]``.
        environment: more environment variables.

    Returns:
        outputs ``[n, ...]``.

    Raises:
        KanCompileError: the emulation is not installed, or it failed.
    """
    lacking = missing(processor)
    if lacking is not None:
        raise KanCompileError(f"processor {processor.name!r}: {lacking}")
    return run_session(command(processor), model, x, environment)


def command(processor: Processor) -> list[str]:
    """Give the command that starts Python on an emulated processor."""
    emulator = [str(qemu(processor.machine)), "-cpu", processor.model]
    if processor.machine == "x86_64":
        return [
            *emulator,
            "-E",
            f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))}",
            "-E",
            "OPENBLAS_CORETYPE=Nehalem",  # NumPy's OpenBLAS takes an emulated Nehalem for a Haswell, and crashes
            os.path.realpath(sys.executable),
        ]
    root = arm64_folder() / f"root-{processor.name}"
    return [*emulator, "-L", str(root), "-E", f"PYTHONPATH={arm64_folder() / 'site'}", str(root / "usr/bin/python3")]


def run_session(
    python: Sequence[str], model: Path, x: NDArray[np.float32], environment: Mapping[str, str] | None = None
) -> NDArray[np.float32]:
    """Run a model in a Python of its own; ``python`` is the command that starts it.

    Raises:
        KanCompileError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "x.npy", Path(folder) / "y.npy"
        np.save(source, np.ascontiguousarray(x, np.float32))
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        process = subprocess.run(
            [*python, str(_SCRIPT), str(model), str(source), str(result)],
            capture_output=True,
            text=True,
            check=False,
            env=inherited | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | dict(environment or {}),
        )
        if process.returncode or not result.is_file():
            said = (process.stderr or process.stdout).strip().splitlines()
            reason = said[-1] if said else f"exit code {process.returncode}"
            raise KanCompileError(f"model {str(model)!r}: {' '.join(python[:3])} failed ({reason})")
        y: NDArray[np.float32] = np.load(result)
        return y


def install() -> Path:
    """Download QEMU and the aarch64 system; what is there already stays.

    Returns:
        the cache folder.

    Raises:
        KanCompileError: a tool is missing or a download failed.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise KanCompileError(f"emulation: found no {tool}, expected a Debian or Ubuntu system to download from")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        work = Path(folder)
        if qemu("aarch64") is None or qemu("x86_64") is None:
            apt = _Apt(work / "apt-host", _dpkg_architecture())
            apt.extract(["qemu-user-static"], work / "qemu", alone=True)
            (work / "qemu").rename(cache_folder() / "qemu")
        if not arm64_folder().is_dir():
            system = work / "arm64"
            # its dependencies come along, so that names of libraries may differ from system to system
            _Apt(work / "apt-arm64", "arm64").extract(
                ["python3-minimal", "python3", "libstdc++6", "zlib1g"], system / "sysroot"
            )
            version = _python_version(system / "sysroot")
            _download_wheels(system / "site", work / "wheels", version)
            for processor in ARM64.values():
                _make_root(system, processor)
            system.rename(arm64_folder())
    return cache_folder()


class _Apt:
    """An apt of its own for one architecture: nothing counts as installed, and nothing outside ``folder`` is written."""

    def __init__(self, folder: Path, architecture: str) -> None:
        for part in ("lists/partial", "cache/archives/partial", "log"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()
        self.archives = folder / "cache" / "archives"
        options = {
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "Dir::State": str(folder),
            "Dir::State::Lists": str(folder / "lists"),
            "Dir::State::status": str(folder / "status"),
            "Dir::Cache": str(folder / "cache"),
            "Dir::Log": str(folder / "log"),
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "APT::Install-Recommends": "false",
        }
        self.command = ["apt-get", "-qq", *[f"-o{key}={value}" for key, value in options.items()]]
        _run([*self.command, "update"])

    def extract(self, packages: Sequence[str], into: Path, alone: bool = False) -> None:
        """Download packages, with all they depend on unless ``alone``, and unpack them."""
        if alone:
            _run([*self.command, "download", *packages], cwd=self.archives)
        else:
            _run([*self.command, "--download-only", "--yes", "install", *packages])
        into.mkdir(parents=True)
        for archive in sorted(self.archives.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive), str(into)])


def _dpkg_architecture() -> str:
    return _run(["dpkg", "--print-architecture"]).strip()


def _python_version(sysroot: Path) -> str:
    return (sysroot / "usr" / "bin" / "python3").readlink().name.removeprefix("python")


def _download_wheels(site: Path, wheels: Path, version: str) -> None:
    wanted = [f"{name}=={metadata.version(name)}" for name in _WHEELS] + list(_WHEEL_NEEDS)
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    choice = ["--no-deps", "--only-binary=:all:", *platforms, "--python-version", version]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "download", *choice, "--dest", str(wheels), *wanted])
    for wheel in sorted(wheels.glob("*.whl")):
        shutil.unpack_archive(wheel, site, "zip")


def _make_root(system: Path, processor: Processor) -> None:
    """Make a root with a ``/proc/cpuinfo`` of the processor; QEMU takes absolute paths from there where they exist.

    The host's text would crash an aarch64 ONNX Runtime when it is imported.
    """
    root = system / f"root-{processor.name}"
    (root / "proc").mkdir(parents=True)
    for part in ("usr", "lib", "etc"):
        if (system / "sysroot" / part).exists():
            (root / part).symlink_to(Path("..") / "sysroot" / part)
    core = [
        "processor\t: {}",
        "BogoMIPS\t: 50.00",
        f"Features\t: {processor.features}",
        "CPU implementer\t: 0x41",
        "CPU architecture: 8",
        "CPU variant\t: 0x0",
        f"CPU part\t: {processor.part}",
        "CPU revision\t: 1",
    ]
    text = "\n".join(core) + "\n\n"
    (root / "proc" / "cpuinfo").write_text("".join(text.format(number) for number in range(2)), encoding="ascii")


def _run(arguments: Sequence[str], cwd: Path | None = None) -> str:
    process = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=cwd)
    if process.returncode:
        said = (process.stderr or process.stdout).strip().splitlines()
        raise KanCompileError(f"emulation: {arguments[0]} failed ({said[-1] if said else process.returncode})")
    return process.stdout


if __name__ == "__main__":
    try:
        print(f"installed in {install()}")
    except KanCompileError as error:
        sys.exit(f"kancompile: error: {error}")
