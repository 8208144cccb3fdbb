"""Backends: a program in, the bytes of a file out. One file or folder each, named in :data:`TARGETS`."""

from __future__ import annotations

from kancompile.targets import c99, litert, ort_cpu, ort_mobile, qnn
from kancompile.targets.c99 import LibraryFacts, library_files
from kancompile.targets.contract import METADATA, SHORT, Target
from kancompile.targets.onnx import PAIR_INDEX

TARGETS: dict[str, Target] = {
    target.name: target for target in (ort_cpu.TARGET, ort_mobile.TARGET, c99.TARGET, litert.TARGET, qnn.TARGET)
}

__all__ = [
    "METADATA",
    "PAIR_INDEX",
    "SHORT",
    "TARGETS",
    "LibraryFacts",
    "Target",
    "library_files",
]
