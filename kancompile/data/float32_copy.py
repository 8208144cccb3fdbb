"""A float32 copy of a model in another precision: files compute in float32, and the user's model stays as it is."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kancompile.data.model import evaluating
from kancompile.data.model_inputs import unwrapped
from kancompile.errors import KanCompileError, reason
from kancompile.ir import NamedTensors, Values, tensors_of

_WITHOUT_TENSORS = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make new tensors float32 meanwhile, whatever ``torch.set_default_dtype`` was told, and restore that afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float32(model: Any, example: Values | Sequence[int]) -> Any:
    """Return a model that computes in float32: itself where it does, else a copy.

    A wrapper of ``torch.compile`` or for several devices is taken off: what it holds is the model. A model is copied where a
    parameter has another type, and where another tensor of it has and keeps it from answering in float32.

    Args:
        model: a module; whatever else it is, it is returned.
        example: an input ``[b, *input_shape]``, or ``input_shape``.

    Raises:
        KanCompileError: it cannot be copied, or is TorchScript.
    """
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise KanCompileError(
            f"model: found a TorchScript module ({type(model).__name__}), which cannot be traced, expected the torch.nn.Module "
            "that it was made from; build that and load its state_dict"
        )
    if not isinstance(model, nn.Module):
        return model
    foreign = [key for key, value in _own_tensors(model) if _is_other_float(value)]
    parameters = dict(model.named_parameters())
    if not foreign or (not parameters.keys() & set(foreign) and _answers_in_float32(model, example)):
        return model
    return _copied(model, foreign[0])


def precision_note(model: Any, used: Any) -> tuple[str, ...]:
    """Say in a line that ``used`` is a float32 copy of a model; nothing where it is the model itself."""
    model = unwrapped(model)
    if used is model:
        return ()
    kinds = sorted(
        {str(value.dtype).removeprefix("torch.") for _, value in _own_tensors(model) if _is_other_float(value)}
    )
    return (
        f"model: holds {' and '.join(kinds)} values; a float32 copy of it was compiled, with which everything is compared",
    )


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers and tensors that are plain attributes, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{name}.{key}" if name else key, value


def _is_other_float(value: Tensor) -> bool:
    return value.is_floating_point() and value.dtype != torch.float32


def _answers_in_float32(model: nn.Module, example: Values | Sequence[int]) -> bool:
    x = example[:2] if isinstance(example, Tensor | NamedTensors) else torch.zeros(2, *example)
    try:
        with evaluating(model) as function, torch.no_grad():
            output = function(x)
    except Exception:  # user code may raise anything, which is told when the model is tried
        return False
    return not any(map(_is_other_float, tensors_of(output)))


def _copied(model: nn.Module, key: str) -> nn.Module:
    """Copy a module, every tensor in it as float32, outside of any graph of gradients, which would forbid copying."""
    made = {id(value): _converted(value) for value in _all_tensors(model)}
    try:
        return copy.deepcopy(model, made)
    except Exception as error:  # attributes may be anything
        raise KanCompileError(
            f"model {type(model).__name__!r}: found {key!r} of {dict(_own_tensors(model))[key].dtype}, expected float32, and the "
            f"model cannot be copied to convert it ({type(error).__name__}: {reason(error)}); call model.float()"
        ) from error


def _converted(value: Tensor) -> Tensor:
    if is_lazy(value):
        return value
    kind = torch.complex64 if value.is_complex() else torch.float32 if value.is_floating_point() else value.dtype
    data = value.detach().to(kind, copy=True)
    return nn.Parameter(data, value.requires_grad) if isinstance(value, nn.Parameter) else data


def _all_tensors(root: Any) -> Iterator[Tensor]:
    """Yield the tensors among attributes and in containers, at any depth, once each."""
    seen: set[int] = set()
    waiting: deque[Any] = deque([root])
    while waiting:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _WITHOUT_TENSORS):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting.extend(value)
        elif hasattr(value, "__dict__"):
            waiting.extend(vars(value).values())
