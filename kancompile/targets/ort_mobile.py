"""Target ``ort-mobile``: an ORT-format file for ONNX Runtime on Android and iOS, optimized in advance ("Fixed" style).

A minimal build of ONNX Runtime has no graph optimizer, so whatever ``ort-cpu`` leaves to the loading of a file must be in the
file: fused integer kernels, and constants that are folded already. That decides how weights are stored. The format has no
4-bit and 2-bit tensors, and nodes that widen bit planes are folded by the conversion (left in, they would run at every
call, and the product would find no constant weight to fuse with). So all widths are int8 in the file, and narrow ones are
saved where phones save them: an APK or IPA is deflated, which brings 4-bit codes to little more than half a byte.

Tables of pairs of rows, which ``ort-cpu`` leaves to the loading as well, would be stored in full (650 KB for 255 rows of 5
bytes). They are only made with ``storage = "fastest"``; those of joint lookups (1.7 MB for a network of 144 KB) never are.

ONNX Runtime writes some lists of the file in the order of a hash that changes from call to call, so equal programs give files of
equal size and content, and not of equal bytes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from kancompile.errors import KanCompileError, reason
from kancompile.ir import Program
from kancompile.targets.contract import Target
from kancompile.targets.onnx import build_model, checked_bytes

CONFIG_SUFFIX = ".required_operators_and_types.config"


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest", batch: int | None = None) -> bytes:
    """Write a program as an ORT-format model.

    ``"smallest"`` stores one table for all its readers, ``"fastest"`` tables of pairs of rows; for one batch size, memory
    is planned when a session is created.
    """
    model = build_model(program, metadata, "fastest", batch, pairs=storage == "fastest")
    return _converted(checked_bytes(ir.to_proto(model)))


def companions(model: bytes) -> dict[str, bytes]:
    """Give the list of operators and types that a minimal build needs for a model, by the suffix of its file."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    with tempfile.TemporaryDirectory() as folder:
        path, config = Path(folder) / "model.ort", Path(folder) / "model.config"
        path.write_bytes(model)
        with _silent():
            create_config_from_models([path], config, True)
        text = config.read_text(encoding="utf-8")
    # its first lines name a folder that no longer exists
    listed = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return {CONFIG_SUFFIX: f"# operators and types for --include_ops_by_config\n{listed}\n".encode()}


def _converted(model: bytes) -> bytes:
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        try:
            with _silent():
                convert_onnx_models_to_ort(
                    path,
                    optimization_styles=[OptimizationStyle.Fixed],
                    target_platform="arm",
                    enable_type_reduction=True,
                )
        except Exception as error:  # its exceptions share no base class
            why = re.sub(re.escape(folder) + r"/?", "", reason(error))
            raise KanCompileError(
                f"target 'ort-mobile': ONNX Runtime cannot convert the model ({why}); compile it for target 'ort-cpu'"
            ) from error
        return path.with_suffix(".ort").read_bytes()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the converter prints, logs and leaves open away from the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
            gc.collect()
    finally:
        logging.disable(previous)


TARGET = Target(
    "ort-mobile",
    ".ort",
    (2, 3, 4, 5, 6, 7, 8),
    emit,
    cpus=("portable", "arm64"),
    takes_batch=True,
    guards_nan=True,
    companions=companions,
)
