"""Compile trained Kolmogorov-Arnold Networks to integer ONNX models that run on stock ONNX Runtime.

    compiled = kancompile.compile(model, calibration)
    compiled.save("model.onnx")
    print(kancompile.validate("model.onnx", model, data).table())

compile        a model and calibration data to a CompiledModel, which saves itself
validate       compare a file with the float model, output by output
benchmark      time a file beside its float model, in interleaved runs
diagnose       say why a compiled model is not more accurate, with the changes that help
compare        rounding methods and bit widths side by side on one model
tune           search the recipe that meets given targets
qat            quantization-aware training: prepare and convert, around your own loop
capture        find the KAN layers of a model: a Program; show prints one
Recipe         every choice of a compilation: bits, method, target's budgets
KanCompileError  what is raised for input that the caller can mend

Names load on first use, so that importing the package (and ``kancompile --help``) does not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kancompile.errors.exceptions import KanCompileError as KanCompileError

if TYPE_CHECKING:
    from kancompile.compiler.compile import compile as compile
    from kancompile.compiler.compiled_model import CompiledModel as CompiledModel
    from kancompile.diagnosis.comparison import compare as compare
    from kancompile.diagnosis.diagnosing import diagnose as diagnose
    from kancompile.diagnosis.tuning import tune as tune
    from kancompile.frontend.capture import capture as capture
    from kancompile.ir.program import Program as Program
    from kancompile.ir.show import show as show
    from kancompile.recipe import Recipe as Recipe
    from kancompile.validation.benchmark import benchmark as benchmark
    from kancompile.validation.validate import validate as validate

_HOMES = {
    "CompiledModel": "kancompile.compiler",
    "Program": "kancompile.ir",
    "Recipe": "kancompile.recipe",
    "benchmark": "kancompile.validation",
    "capture": "kancompile.frontend",
    "compare": "kancompile.diagnosis",
    "compile": "kancompile.compiler",
    "diagnose": "kancompile.diagnosis",
    "show": "kancompile.ir",
    "tune": "kancompile.diagnosis",
    "validate": "kancompile.validation",
}
__all__ = ["KanCompileError", "qat", *_HOMES]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "__doc__", "__name__", "__file__", "__path__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("kancompile")
    if name == "qat":  # a room with a door of its own
        return importlib.import_module("kancompile.qat")
    if name not in _HOMES:
        raise AttributeError(f"module 'kancompile' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
