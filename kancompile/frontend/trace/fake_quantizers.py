"""Write fake quantizers of ``torch.ao`` as what they compute, since ``torch.export`` cannot trace them for batches of any size.

    fake_quantize(x)      ->      s (clamp(round(x / s) + z, least, most) - z)

with one scale and zero point, or those of every channel, as PyTorch's kernels compute it (``FakeQuantizeCore.cpp``). A network
that was trained with quantized activations is then captured like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kancompile.errors import KanCompileError


class PlainFakeQuantizers(TorchFunctionMode):
    """While it is entered, calls of fake quantization are roundings, clamps and products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Exchange one call."""
        return _FORMS.get(func, func)(*args, **(kwargs or {}))


def refuse_observers(model: nn.Module) -> None:
    """Verify that all scales stay as they are.

    Raises:
        KanCompileError: an observer is on, so that what a module computes depends on all samples of a batch.
    """
    for name, module in _fake_quantizers(model).items():
        if bool(module.observer_enabled.any()):
            raise KanCompileError(
                f"fake quantizer {name!r}: found an observer that is on, expected scales that stay as they are; call "
                "model.apply(torch.ao.quantization.disable_observer)"
            )


@contextmanager
def plain_fake_quantizers(model: nn.Module) -> Iterator[None]:
    """Let the modules for fake quantization in a model, whose observers are off, compute what their flags and scales say now."""
    modules = _fake_quantizers(model).values()
    try:
        for module in modules:
            module.forward = _computed(module)
        with PlainFakeQuantizers():
            yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def fake_quantize(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """Round to multiples of one scale, called as ``torch.fake_quantize_per_tensor_affine``."""
    inverse = 1 / scale if isinstance(scale, Tensor) else float(np.float32(1) / np.float32(scale))
    codes = torch.clamp(torch.round(input * inverse) + zero_point, quant_min, quant_max)
    return (codes - zero_point) * scale


def fake_quantize_channels(
    input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """Round to multiples of the scale of each channel, called as ``torch.fake_quantize_per_channel_affine``."""
    shape = [1] * input.dim()
    shape[axis] = -1
    return fake_quantize(input, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)


def _fake_quantizers(model: nn.Module) -> dict[str, Any]:
    """Find the modules by name; a model that has one has imported their package, which no other one needs."""
    package = sys.modules.get("torch.ao.quantization.fake_quantize")
    kinds = () if package is None else package.FakeQuantize
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _computed(module: Any) -> Callable[[Tensor], Tensor]:
    """Give the forward of a module whose observer is off."""
    least, most = module.activation_post_process.quant_min, module.activation_post_process.quant_max
    if not bool(module.fake_quant_enabled.any()):
        return lambda X: X
    if module.is_per_channel:
        return lambda X: fake_quantize_channels(X, module.scale, module.zero_point, module.ch_axis, least, most)
    scale, zero_point = float(module.scale), int(module.zero_point)
    return lambda X: fake_quantize(X, scale, zero_point, least, most)


_FORMS: dict[Any, Callable[..., Any]] = {
    torch.fake_quantize_per_tensor_affine: fake_quantize,
    torch.fake_quantize_per_channel_affine: fake_quantize_channels,
}
