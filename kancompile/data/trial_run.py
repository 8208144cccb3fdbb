"""Try the user's model on two samples before anything is traced, and name the cause where it fails."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from kancompile.data.calibration import Calibration
from kancompile.data.model import Reference, evaluating
from kancompile.errors import KanCompileError, error_source, reason

# what no other samples would mend
_OF_THE_MODEL = (AttributeError, NameError, ImportError, NotImplementedError, KeyError, UnboundLocalError, SyntaxError)
_OF_TYPES = re.compile(r"\bdtype|scalar type|[Dd]ouble|Half|BFloat16|c10::complex")
_OF_INDICES = re.compile(r"Long|\bInt\b|indices|as ind")
_MOST_SIZES, _LARGEST_SIZE = 24, 1 << 16


def check_fits(reference: Reference, samples: Calibration) -> None:
    """Make sure that the model takes samples of this shape.

    Raises:
        KanCompileError: it does not; the cause is named: its inputs, its numbers, its device, its own code, or, where it takes
            some other shape, the samples.
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
            _check_device(reference)
        raise KanCompileError(_cause(reference, x, error)) from error
    # a model that begins with reshape(-1, n_in) takes any multiple of n_in and answers for another number of samples
    if isinstance(output, Tensor) and output.shape[:1] != x.shape[:1]:
        raise KanCompileError(
            f"calibration: found samples of shape {samples.input_shape!r}, for {len(x)} of which the model returns shape "
            f"{tuple(output.shape)!r}; expected one row for each, so inputs as it was trained with{_other_shape(reference, x)}"
        )


def _cause(reference: Reference, x: Tensor, error: Exception) -> str:
    """Say what a failed trial is about; the samples are blamed where the model takes others."""
    line = error_source(error)
    shape = tuple(x.shape[1:])
    raised = f"raises {type(error).__name__}{f' in {line}' if line else ''} ({reason(error)})"
    who = f"model {type(reference).__name__!r}: {raised}"
    if isinstance(error, _OF_THE_MODEL):
        return f"{who} in evaluation mode, expected one that computes; the samples are not the cause"
    if _OF_TYPES.search(str(error)) and not _OF_INDICES.search(str(error)):
        return (
            f"{who}, expected float32 throughout; the samples are not the cause: create and convert tensors in forward with the "
            "type of the input (dtype=x.dtype), not with .double(), .half() or a type of their own"
        )
    if hint := _other_shape(reference, x):
        return (
            f"calibration: found samples of shape {shape!r}, on which the model {raised}; expected inputs as it was trained "
            f"with{hint}"
        )
    return (
        f"{who} on samples of shape {shape!r} and on every other shape that was tried, expected one that computes in evaluation "
        "mode, without gradients, on float32 batches; where model(x) runs in your code, pass such an x"
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


def _check_device(model: nn.Module) -> None:
    """Refuse weights on another device than samples are."""
    for key, value in {**dict(model.named_buffers()), **dict(model.named_parameters())}.items():
        if value.device.type != "cpu":
            raise KanCompileError(
                f"model {type(model).__name__!r}: found {key!r} on {value.device}, expected the CPU; call model.cpu(), and mend "
                "code that moves tensors to a device of its own"
            )


def _other_shape(reference: Reference, x: Tensor) -> str:
    """Try other layouts and numbers of features, and say which the model takes; empty where it takes none of them."""
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
        if _takes(reference, other.contiguous()):
            return f"; it takes these {how}"
    place = 0 if x.ndim > 3 else x.ndim - 2
    for size in _sizes(reference):
        shape = [*x.shape[1:]]
        shape[place] = size
        if _takes(reference, x.new_zeros(len(x), *shape)):
            return f"; it takes samples of shape {tuple(shape)!r}"
    return ""


def _sizes(reference: Reference) -> list[int]:
    """List what may be a number of features: the sizes of the weights, in their order."""
    tensors = reference.parameters() if isinstance(reference, nn.Module) else ()
    found = dict.fromkeys(size for value in tensors for size in reversed(value.shape) if size <= _LARGEST_SIZE)
    return list(found)[:_MOST_SIZES]


def _takes(reference: Reference, x: Tensor) -> bool:
    try:
        with evaluating(reference) as model, torch.no_grad():
            output = model(x)
    except Exception:  # user code may raise anything, and then this is not the shape
        return False
    return isinstance(output, Tensor) and output.shape[:1] == x.shape[:1]
