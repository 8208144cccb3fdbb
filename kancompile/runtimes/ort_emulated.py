"""Runtimes ``ort-x86-*`` and ``ort-arm64-*``: ONNX Runtime on emulated processors, one for each class of integer kernels."""

from __future__ import annotations

from functools import partial

from kancompile.runtimes import emulation
from kancompile.runtimes.contract import Runtime
from kancompile.runtimes.emulation import ARM64, X86, Processor


def _runtime(family: str, processor: Processor) -> Runtime:
    return Runtime(
        f"ort-{family}-{processor.name}",
        "ort-cpu",
        partial(emulation.missing, processor),
        partial(emulation.run_emulated, processor),
        0,
        emulated=True,
    )


ORT_X86 = tuple(_runtime("x86", processor) for processor in X86.values())
ORT_ARM64 = tuple(_runtime("arm64", processor) for processor in ARM64.values())
