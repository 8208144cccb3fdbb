"""Backends: one file each, named in :data:`TARGETS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kancompile.program import Program
from kancompile.targets import ort_cpu


@dataclass(frozen=True)
class Target:
    """What a target can do, as data, and its one function.

    Attributes:
        name: how users call it.
        suffix: of the file it writes.
        weight_bits: widths of weights it stores.
        emit: writes a program with metadata and a choice of storage as the bytes of a file.
    """

    name: str
    suffix: str
    weight_bits: tuple[int, ...]
    emit: Callable[[Program, Mapping[str, str], str], bytes]


TARGETS: dict[str, Target] = {
    "ort-cpu": Target("ort-cpu", ".onnx", (2, 3, 4, 5, 6, 7, 8), ort_cpu.emit),
}
