"""Weights that this processor multiplies as the simulation does, for programs that are drawn and not rounded."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def adds_products_exactly() -> bool:
    """Say whether this processor adds products of 8 bits without saturation, which drawn programs take for granted."""
    about = Path("/proc/cpuinfo")
    return platform.machine() in ("aarch64", "arm64") or (about.is_file() and "vnni" in about.read_text())


def code_limit(bits: int) -> int:
    """Return the least power of two above all codes; without VNNI two products of a byte and a code fit int16 up to 64."""
    limit = 1 << (bits - 1)
    return limit if adds_products_exactly() else min(limit, 64)
