"""Runtimes that a compiled file is validated in, named in :data:`RUNTIMES`."""

from __future__ import annotations

from kancompile.runtimes import c99, litert, openvino, tract, web
from kancompile.runtimes.contract import Prepared, Runtime, bounded_rows, seconds_of
from kancompile.runtimes.machine import available_cores, describe_machine
from kancompile.runtimes.ort import ORT, ORT_MOBILE
from kancompile.runtimes.ort_emulated import ORT_ARM64, ORT_X86
from kancompile.runtimes.output_quantum import output_quantum
from kancompile.runtimes.session import CALIBRATED_RANGE, ModelFile, RuntimeModel, name_of, open_session, read_model

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

__all__ = [
    "CALIBRATED_RANGE",
    "ORT",
    "RUNTIMES",
    "ModelFile",
    "Prepared",
    "Runtime",
    "RuntimeModel",
    "available_cores",
    "bounded_rows",
    "describe_machine",
    "name_of",
    "open_session",
    "output_quantum",
    "read_model",
    "seconds_of",
    "web",
]
