"""Describe the machine that a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import torch

# what decides how fast int8 products are, as /proc/cpuinfo spells it on x86 and on ARM
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve", "sme")


def available_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Name processor, cores, instructions for integer products, the load at this moment, and versions."""
    described: dict[str, Any] = {
        "cpu": _processor(),
        "cores": available_cores(),
        "instructions": _instructions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        described["load"] = round(os.getloadavg()[0], 2)
    return described | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        for line in with_names.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    return platform.processor() or platform.machine()


def _instructions() -> str:
    """Name those of :data:`_INSTRUCTIONS` that the processor has; ``"unknown"`` where the system does not tell."""
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                present = set(value.split())
                return " ".join(name for name in _INSTRUCTIONS if name in present) or "none of interest"
    return "unknown"
