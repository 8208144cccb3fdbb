"""What a model does to its real inputs, one by one, before it looks them up: normalization, clipping.

These are the float operations of ``kan_model_quantize``: IEEE arithmetic in the order of the program, each with a constant of
each input or with one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatStep:
    """One operation ``x = form(x, constant)``.

    Attributes:
        form: C expression in ``x`` and ``c``.
        constant: float32 ``[elements]``.
    """

    form: str
    constant: Tensor

    def at(self, elements: Tensor) -> FloatStep:
        """Take the constants of some elements."""
        return FloatStep(self.form, self.constant[elements])


def are_equal(first: Sequence[FloatStep], second: Sequence[FloatStep]) -> bool:
    """Whether two lists of steps compute the same."""
    return len(first) == len(second) and all(
        a.form == b.form and torch.equal(a.constant, b.constant) for a, b in zip(first, second, strict=True)
    )


Constants = list[tuple[str, Tensor]]
"""Forms and their constants, which broadcast to the elements."""


def float_steps(name: str, at: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Any:
    """Write an ATen operator on real inputs as steps; ``None`` where it has no such form.

    Args:
        name: of the operator.
        at: which argument the inputs are.
        args: of the operator; the inputs themselves are ignored, all others are constants.
        kwargs: of the operator.
        shape: of the inputs, ``[1, ...]``.
    """
    form = _FORMS.get(name)
    if form is None or not all(
        isinstance(value, Tensor | float | int | bool | None) for value in args[:at] + args[at + 1 :]
    ):
        return None
    found = form(at, args, kwargs, shape)
    if found is None:
        return None
    steps = []
    for text, constant in found:
        if constant.dtype not in (torch.float32, torch.int64) or torch.broadcast_shapes(constant.shape, shape) != shape:
            return None
        steps.append(FloatStep(text, constant.to(torch.float32).expand(shape).reshape(-1)))
    return tuple(steps)


def _binary(forward: str, backward: str) -> Callable[..., Constants | None]:
    """Give the form for ``x op c`` and for ``c op x``."""

    def steps(at: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Constants | None:
        if len(args) != 2 or any(value != 1 for value in kwargs.values()):
            return None
        return [((forward, backward)[at], torch.as_tensor(args[1 - at]))]

    return steps


def _clamp(at: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Constants | None:
    low, high = ([*args[1:], None, None])[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    below = [] if low is None else [("x < c ? c : x", torch.as_tensor(low))]
    return below + ([] if high is None else [("x > c ? c : x", torch.as_tensor(high))])


def _batch_norm(at: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Constants | None:
    """As PyTorch computes it, ``x * alpha + beta``."""
    _, weight, bias, mean, variance, _, epsilon = args
    alpha = 1 / torch.sqrt(variance + epsilon)
    alpha = alpha if weight is None else alpha * weight
    beta = -mean * alpha if bias is None else bias - mean * alpha
    place = [1, -1, *[1] * (len(shape) - 2)]
    return [("x * c", alpha.reshape(place)), ("x + c", beta.reshape(place))]


_FORMS: dict[str, Callable[..., Constants | None]] = {
    "add": _binary("x + c", "c + x"),
    "sub": _binary("x - c", "c - x"),
    "rsub": _binary("c - x", "x - c"),
    "mul": _binary("x * c", "c * x"),
    "div": _binary("x / c", "c / x"),
    "neg": lambda *_: [("c - x", torch.tensor(0.0))],
    "clamp": _clamp,
    "hardtanh": lambda at, args, kwargs, shape: _clamp(at, (args[0], *([*args[1:], -1.0, 1.0][:2])), kwargs, shape),
    "clamp_min": lambda at, args, kwargs, shape: _clamp(at, (args[0], args[1]), {}, shape),
    "clamp_max": lambda at, args, kwargs, shape: _clamp(at, (args[0], None, args[1]), {}, shape),
    "relu": lambda *_: [("x < c ? c : x", torch.tensor(0.0))],
    "_native_batch_norm_legit_no_training": _batch_norm,
}
