"""Runtimes ``ort-x86-*`` and ``ort-arm64-*``: ONNX Runtime on emulated processors, one for each class of integer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kancompile.errors import KanCompileError
from kancompile.runtimes import emulation
from kancompile.runtimes.contract import Array, Prepared, Runtime
from kancompile.runtimes.emulation import ARM64, X86, Processor


@dataclass(frozen=True)
class _Emulated:
    """A file for an emulated processor, which a process of its own loads on every run."""

    processor: Processor
    model: Path

    def run(self, x: Array) -> Array:
        return emulation.run_emulated(self.processor, self.model, x)

    def seconds(self, x: Array, calls: int) -> list[float]:
        raise KanCompileError(f"processor {self.processor.name!r}: it is emulated, so its speed says nothing")


@contextmanager
def _prepare(processor: Processor, model: Path, threads: int) -> Iterator[Prepared]:
    yield _Emulated(processor, model)


def _runtime(family: str, processor: Processor) -> Runtime:
    return Runtime(
        f"ort-{family}-{processor.name}",
        "ort-cpu",
        partial(emulation.missing, processor),
        partial(_prepare, processor),
        0,
        emulated=True,
    )


ORT_X86 = tuple(_runtime("x86", processor) for processor in X86.values())
ORT_ARM64 = tuple(_runtime("arm64", processor) for processor in ARM64.values())
