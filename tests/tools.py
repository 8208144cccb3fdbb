"""What tests may need and a machine may lack: how to find out whether it is there, and how to install it.

The names stand in ``@pytest.mark.needs(...)``; ``tests/needs.py`` skips by them, and fails tests that call a tool unnamed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.c99 import cortex_m
from kancompile.runtimes import RUNTIMES, c99, web


@dataclass(frozen=True)
class Tool:
    """Something that a test may need and a machine may lack.

    Attributes:
        missing: says what is missing and how to install it; ``None`` where nothing is.
        programs: programs and scripts; to start one is to call the tool.
        modules: top-level modules; to import or run one is to call the tool.
    """

    missing: Callable[[], str | None]
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


def _program(*names: str, package: str) -> Tool:
    def missing() -> str | None:
        absent = [name for name in names if shutil.which(name) is None]
        return f"no {', '.join(absent)} on the PATH; install it: apt-get install {package}" if absent else None

    return Tool(missing, programs=names)


def _package(*modules: str, install: str) -> Tool:
    def missing() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"no Python module {', '.join(absent)}; install it: pip install {install}" if absent else None

    return Tool(missing, modules=modules)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """Return the path of a browser that tests may open."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def _no_browser() -> str | None:
    return None if browser() else "no chromium on the PATH; install it: apt-get install chromium"


def _no_playwright() -> str | None:
    if (web.node_modules() / "playwright-core").is_dir():
        return None
    return f"no playwright-core; install it: npm install --prefix {web.node_modules().parent} playwright-core@1.65.1"


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


CLIENTS = "--no-deps -r tests/clients/requirements.txt"

TOOLS: dict[str, Tool] = {
    # C
    "gcc": _program("gcc", "size", package="gcc"),
    "g++": _program("g++", package="g++"),
    "cmake": _program("cmake", package="cmake"),
    "clang": _program("clang", package="clang"),
    "c99": Tool(c99.missing, programs=(*c99.COMPILERS, Path(os.environ.get("CC") or "cc").name)),
    "cortex-m": Tool(cortex_m.missing, programs=("arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm")),
    # the web
    "node": _program("node", package="nodejs"),
    "web": Tool(web.missing, programs=("node",)),
    "chromium": Tool(_no_browser, programs=BROWSERS),
    "playwright-core": Tool(_no_playwright, programs=("drive_page.mjs", "open_report.mjs")),
    # shells, and what a checkout has
    "bash": _program("bash", package="bash"),
    "zsh": _program("zsh", package="zsh"),
    "fish": _program("fish", package="fish"),
    "git": _program("git", package="git"),
    "ruff": _package("ruff", install="'kancompile[lint]'"),
    "sphinx": _package("sphinx", "furo", "myst_parser", install="'kancompile[docs]'"),
    # ONNX Runtime on emulated processors: the processor is an option of the emulator of its machine
    **{
        name: Tool(RUNTIMES[name].missing, programs=(f"qemu-{machine}-static", f"qemu-{machine}"))
        for family, machine in (("ort-x86-", "x86_64"), ("ort-arm64-", "aarch64"))
        for name in RUNTIMES
        if name.startswith(family)
    },
    # other runtimes
    "litert": Tool(RUNTIMES["litert"].missing, modules=("ai_edge_litert", "flatbuffers")),
    "openvino": Tool(RUNTIMES["openvino"].missing, modules=("openvino",)),
    "tract": Tool(RUNTIMES["tract"].missing, modules=("tract",)),
    # a process of its own imports it, so that the script stands for the package
    "qnn": Tool(_package("onnxruntime_qnn", install="'kancompile[qnn]'").missing, programs=("htp_simulator.py",)),
    # other Python packages
    "pillow": _package("PIL", install="'kancompile[images]'"),
    "matplotlib": _package("matplotlib", install="'kancompile[plots]'"),
    "pandas": _package("pandas", install="pandas"),
    "yaml": _package("yaml", install="pyyaml"),
    "nbclient": _package("nbclient", "nbformat", "ipykernel", "ipykernel_launcher", install="nbclient ipykernel"),
    "ipywidgets": _package("ipywidgets", install="ipywidgets"),
    # KANs of others
    "pykan": _package("kan", "yaml", install="'kancompile[pykan]'"),
    "Deep-KAN": _package("deepkan", install="Deep-KAN"),
    "fkan": _package("fkan", install="fkan"),
    "rkan": _package("rkan", install="rkan"),
    "inKAN": _package("inkan", install="inKAN"),
    "flashkan": _package("flashkan", install="flashkan"),
    "convkan": _package("convkan", install=CLIENTS),
    "ikan": _package("ikan", install=CLIENTS),
    # no program and no module: only what a test says about itself is known
    "cuda": Tool(_no_cuda),
}
