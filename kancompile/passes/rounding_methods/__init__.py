"""The rounding methods by the names that recipes use."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.awq import Awq
from kancompile.passes.rounding_methods.brecq import Block, Brecq
from kancompile.passes.rounding_methods.drift import FOLDS, DriftRows, MadeUp, make_up
from kancompile.passes.rounding_methods.gptq import Gptq, polish_rounded
from kancompile.passes.rounding_methods.group_scales import WIDEST_BITS, common_scale, settle_group_scales, snap_scales
from kancompile.passes.rounding_methods.guard import with_guard
from kancompile.passes.rounding_methods.problem import (
    FeatureSource,
    Method,
    Rounded,
    RoundingProblem,
    add_products,
    bias_correction,
    corrected,
    mirror,
    objective,
    on_fine_table,
    output_errors,
    output_spreads,
    rescaled,
)
from kancompile.passes.rounding_methods.quantizers import (
    Width,
    code_range,
    round_to_nearest,
    scale_of_column,
    search_scale,
    stored_bits,
)
from kancompile.passes.rounding_methods.uniform import Uniform

METHODS: dict[str, Method] = {
    "uniform": Uniform(),
    "gptq": Gptq(),
    "awq": Awq(inner=Uniform()),
    "awq+gptq": Awq(inner=Gptq()),
    "adaround": AdaRound(),
    "awq+adaround": Awq(inner=AdaRound()),
    "brecq": Brecq(start=Awq(inner=Gptq())),
}


def method_named(name: str, device: str = "cpu") -> Method:
    """Return a method by its name, with its matrices on ``device`` where it has such a choice.

    Raises:
        KanCompileError: there is none of that name, or PyTorch has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise KanCompileError("device 'cuda': PyTorch finds no CUDA device here; use device 'cpu'")
    if name not in METHODS:
        raise KanCompileError(f"method {name!r} is unknown, expected one of {sorted(METHODS)!r}")
    return _on_device(METHODS[name], device)


def quick_methods(columns: int = 1) -> list[str]:
    """Name the methods that leave less error than nearest rounding and take seconds for a layer of so many columns."""
    return [name for name, method in METHODS.items() if method.compensates and columns <= method.quick_columns]


def _on_device(method: Any, device: str) -> Method:
    """Set ``device`` in a method's options and in those of the methods it builds on."""
    changed: dict[str, Any] = {}
    for option in fields(method):
        value = getattr(method, option.name)
        if option.name == "device":
            changed["device"] = device
        elif option.name in ("inner", "start"):
            changed[option.name] = _on_device(value, device)
    moved: Method = replace(method, **changed)
    return moved


__all__ = [
    "FOLDS",
    "METHODS",
    "WIDEST_BITS",
    "Block",
    "Brecq",
    "DriftRows",
    "FeatureSource",
    "Gptq",
    "MadeUp",
    "Method",
    "Rounded",
    "RoundingProblem",
    "Uniform",
    "Width",
    "add_products",
    "bias_correction",
    "code_range",
    "common_scale",
    "corrected",
    "make_up",
    "method_named",
    "mirror",
    "objective",
    "on_fine_table",
    "output_errors",
    "output_spreads",
    "polish_rounded",
    "quick_methods",
    "rescaled",
    "round_to_nearest",
    "scale_of_column",
    "search_scale",
    "settle_group_scales",
    "snap_scales",
    "stored_bits",
    "with_guard",
]
