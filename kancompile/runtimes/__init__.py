"""Runtimes that a compiled file is validated in, named in :data:`RUNTIMES`."""

from __future__ import annotations

from kancompile.runtimes import c99, litert, openvino, tract, web
from kancompile.runtimes.contract import Runtime
from kancompile.runtimes.ort import ORT, ORT_MOBILE
from kancompile.runtimes.ort_emulated import ORT_ARM64, ORT_X86

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        ORT,
        ORT_MOBILE,
        c99.RUNTIME,
        web.RUNTIME,
        litert.RUNTIME,
        openvino.RUNTIME,
        tract.RUNTIME,
        *ORT_X86,
        *ORT_ARM64,
    )
}
