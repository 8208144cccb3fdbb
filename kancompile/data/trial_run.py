"""Try the user's model on two samples before anything is traced, and name the cause where it fails."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from kancompile.data.calibration import Calibration
from kancompile.data.model import Reference, evaluating
from kancompile.errors import KanCompileError, error_source, reason

# what no other samples would mend
_OF_THE_MODEL = (AttributeError, NameError, ImportError, NotImplementedError, KeyError, UnboundLocalError, SyntaxError)


def check_fits(reference: Reference, samples: Calibration) -> None:
    """Make sure that the model takes samples of this shape.

    Raises:
        KanCompileError: it does not; the cause is named: its inputs, its numbers, its device, its own code, or the samples.
    """
    x = samples.samples[:2]
    if isinstance(reference, nn.Module):
        _check_forward(reference)
        check_one_input(reference)
    try:
        with evaluating(reference) as model, torch.no_grad():
            output = model(x)
    except KanCompileError:
        raise
    except Exception as error:  # user code may raise anything
        if isinstance(reference, nn.Module):
            _check_weights(reference)
        line = error_source(error)
        where = f" in {line}" if line else ""
        if isinstance(error, _OF_THE_MODEL):
            raise KanCompileError(
                f"model {type(reference).__name__!r}: raises {type(error).__name__}{where} ({reason(error)}) in evaluation mode, "
                "expected one that computes; the samples are not the cause"
            ) from error
        raise KanCompileError(
            f"calibration: found samples of shape {samples.input_shape!r}, on which the model raises "
            f"{type(error).__name__}{where} ({reason(error)}); expected inputs as it was trained with{_other_shape(reference, x)}"
        ) from error
    # a model that begins with reshape(-1, n_in) takes any multiple of n_in and answers for another number of samples
    if isinstance(output, Tensor) and output.shape[:1] != x.shape[:1]:
        raise KanCompileError(
            f"calibration: found samples of shape {samples.input_shape!r}, for {len(x)} of which the model returns shape "
            f"{tuple(output.shape)!r}; expected one row for each, so inputs as it was trained with{_other_shape(reference, x)}"
        )


def check_one_input(model: nn.Module) -> None:
    """Refuse a forward that cannot be called with one positional tensor, before longer words of whoever calls it.

    Raises:
        KanCompileError: it needs another number of inputs.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a compiled forward has none
        return
    try:
        signature.bind(torch.empty(0))
    except TypeError as error:
        raise KanCompileError(
            f"model {type(model).__name__!r}: found forward{signature}, expected exactly one tensor input ({error}); "
            "wrap the model in a module of one input"
        ) from None


def _check_forward(model: nn.Module) -> None:
    """Refuse a class whose forward nobody wrote."""
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise KanCompileError(
            f"model {type(model).__name__!r}: found no method forward, expected forward(self, x); define it in the class"
        )


def _check_weights(model: nn.Module) -> None:
    """Refuse weights of another type or on another device than samples are."""
    name = type(model).__name__
    values = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for key, value in values.items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise KanCompileError(
                f"model {name!r}: found {key!r} of {value.dtype}, expected float32; call model.float() after loading the weights"
            )
        if value.device.type != "cpu":
            raise KanCompileError(
                f"model {name!r}: found {key!r} on {value.device}, expected the CPU; call model.cpu(), and mend code that moves "
                "tensors to a device of its own"
            )


def _other_shape(reference: Reference, x: Tensor) -> str:
    """Try the usual other layouts of samples, and say which one the model takes; empty where it takes none of them."""
    layouts = [("flat: pass x.reshape(len(x), -1)", x.flatten(1))] if x.ndim > 2 else []
    if x.ndim == 4:
        layouts = [
            ("with the channels first: pass x.transpose(0, 3, 1, 2)", x.permute(0, 3, 1, 2)),
            ("with the channels last: pass x.transpose(0, 2, 3, 1)", x.permute(0, 2, 3, 1)),
            *layouts,
        ]
    if x.ndim == 3:
        layouts.append(("with a channel of their own: pass x[:, None]", x[:, None]))
    for how, other in layouts:
        try:
            with evaluating(reference) as model, torch.no_grad():
                output = model(other.contiguous())
        except Exception:  # user code may raise anything, and then this is not the layout
            continue
        if isinstance(output, Tensor) and output.shape[:1] == x.shape[:1]:
            return f"; it takes these {how}"
    return ""
