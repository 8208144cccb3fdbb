"""Try the user's model on two samples before anything is traced, and name the cause where it fails."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data.calibration import Calibration
from kancompile.data.entries import ONE, hint_of_several, not_one
from kancompile.data.float32_copy import in_float32
from kancompile.data.model import Reference, evaluating
from kancompile.data.model_inputs import check_arguments, in_order, model_inputs
from kancompile.errors import KanCompileError, error_source, reason
from kancompile.ir import NamedTensors, Values, by_name, tensors_of

# what no other samples would mend
_OF_THE_MODEL = (AttributeError, NameError, ImportError, NotImplementedError, KeyError, UnboundLocalError, SyntaxError)
_OF_TYPES = re.compile(r"\bdtype|scalar type|[Dd]ouble|Half|BFloat16|c10::complex")
_OF_INDICES = re.compile(r"Long|\bInt\b|indices|as ind|for index")
_MOST_SIZES, _LARGEST_SIZE = 24, 1 << 16


def check_fits(reference: Reference, samples: Calibration) -> Calibration:
    """Make sure that the model takes such samples, and give them with the types that it reads; an exported program says them.

    A model that takes whole numbers as float32 gets float32, as all its other inputs have; integers and booleans stay what they
    are where it does not, such as tokens of an embedding.

    Raises:
        KanCompileError: it does not take them; the cause is named: its inputs, its numbers, its device, its own code, or the
            samples.
    """
    if isinstance(reference, ExportedProgram):
        return _ordered(reference, _typed_as(reference, samples))
    reference = in_float32(reference, samples.first(2))
    if isinstance(reference, nn.Module):
        _check_forward(reference)
    failures: list[tuple[int, KanCompileError]] = []
    for typed in _typings(samples):
        try:
            _check_run(reference, typed)
        except KanCompileError as error:
            failures.append((_rank(error.__cause__), error))
        else:
            return _ordered(reference, typed)
    inputs = model_inputs(reference)
    one = inputs if inputs is not None and len(inputs.required) == 1 and not inputs.takes_parts else None
    if (
        one is not None and len(samples.arrays) > 1 and not set(samples.arrays) & set(one.names)
    ):  # it might have been a dict
        raise not_one(list(samples.arrays), "x", samples.name)
    raise min(failures, key=lambda failure: failure[0])[1]


def _rank(error: BaseException | None) -> int:
    """Say how little an error tells: numbers that an embedding does not know most, that it does not read floats least."""
    return 0 if isinstance(error, IndexError) else 2 if _OF_INDICES.search(str(error)) else 1


def _ordered(reference: Reference, samples: Calibration) -> Calibration:
    first: Values = samples.first(1)
    return samples.in_order(list(by_name(in_order(reference, first), [ONE])))


def _typed_as(exported: ExportedProgram, samples: Calibration) -> Calibration:
    """Give the samples of an exported program with the types that it declares."""
    nodes = [
        n for n in exported.graph.nodes if n.op == "placeholder" and n.name in exported.graph_signature.user_inputs
    ]
    reads = {
        node.name: node.meta["val"].dtype.is_floating_point for node in nodes if isinstance(node.meta["val"], Tensor)
    }
    whole = [name for name, array in samples.arrays.items() if array.dtype.kind in "ib"]
    return samples.as_floats([name for name in whole if reads.get(name, all(reads.values()))])


def _typings(samples: Calibration) -> Iterator[Calibration]:
    """Give the types that whole numbers may have, the likeliest first."""
    whole = [name for name, array in samples.arrays.items() if array.dtype.kind in "ib"]
    several = len(samples.arrays) > 1
    orders = [[], whole] if several else [whole, []]
    if several and len(whole) > 1:
        orders += [[name] for name in whole] + [[n for n in whole if n != name] for name in whole if len(whole) > 2]
    for names in orders if whole else [[]]:
        yield samples.as_floats(names)


def _check_run(reference: Reference, samples: Calibration) -> None:
    x = _trial_rows(samples)
    shapes = {name: tuple(array.shape[1:]) for name, array in samples.arrays.items()}
    shape = shapes.get("", shapes)
    try:
        with evaluating(reference) as model, torch.no_grad():
            output = model(x)
    except KanCompileError:
        raise
    except Exception as error:  # user code may raise anything
        if isinstance(reference, nn.Module):
            _check_device(reference)
            check_arguments(reference, x)
        raise KanCompileError(_cause(reference, x, error)) from error
    # a model that begins with reshape(-1, n_in) takes any multiple of n_in and answers for another number of samples
    for value in tensors_of(output):
        if value.shape[:1] != torch.Size([len(x)]):
            raise KanCompileError(
                f"calibration: found samples of shape {shape!r}, for {len(x)} of which the model returns shape "
                f"{tuple(value.shape)!r}; expected one row for each, so inputs as it was trained with"
                f"{_other_shape(reference, x) or _without(reference, x)}"
            )


def _trial_rows(samples: Calibration) -> Values:
    """Give two samples, and those of the smallest and the largest whole numbers, which are the likeliest to be refused."""
    rows = dict.fromkeys((0, 1))
    for array in samples.arrays.values():
        if array.dtype.kind == "i":
            flat = array.reshape(len(array), -1)
            rows |= dict.fromkeys((int(flat.min(1).argmin()), int(flat.max(1).argmax())))
    values: Values = samples.samples[torch.tensor(list(rows))]
    return values


def _read_as_indices(error: Exception, x: Values) -> str:
    """Say which inputs are floats, where the model wanted integers; empty for other errors."""
    real = {name: value for name, value in by_name(x, [ONE]).items() if value.is_floating_point()}
    if not real or (isinstance(error, IndexError) and "indices must be" not in str(error)):
        return ""
    if not _OF_INDICES.search(str(error)):
        return ""
    kinds = {n: "whole numbers as floats" if bool((v == v.round()).all()) else "fractions" for n, v in real.items()}
    return "found " + ", ".join(f"{kind} in {n!r}" if n else kind for n, kind in kinds.items())


def _beyond_vocabulary(error: Exception, x: Values) -> str:
    """Say the range of whole numbers that an embedding refused."""
    if not isinstance(error, IndexError):
        return ""
    whole = {name: value for name, value in by_name(x, [""]).items() if not value.is_floating_point()}
    ranges = [
        f"{int(value.min())} ... {int(value.max())}{f' in {name!r}' if name else ''}" for name, value in whole.items()
    ]
    lengths = sorted({value.shape[1] for value in whole.values() if value.ndim > 1})
    rows = f", in rows of {' and '.join(map(str, lengths))}, which positions must reach" if lengths else ""
    return f", here numbers of the model's vocabulary; found {', '.join(ranges)}{rows}" if ranges else ""


def _check_forward(model: nn.Module) -> None:
    """Refuse a class whose forward nobody wrote."""
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise KanCompileError(
            f"model {type(model).__name__!r}: found no method forward, expected forward(self, x); define it in the class"
        )


def _cause(reference: Reference, x: Values, error: Exception) -> str:
    """Say what a failed trial is about; the samples are blamed where the model takes others."""
    line = error_source(error)
    shapes = {name: tuple(value.shape[1:]) for name, value in by_name(x, [ONE]).items()}
    shape = shapes.get(ONE, shapes)
    raised = f"raises {type(error).__name__}{f' in {line}' if line else ''} ({reason(error)})"
    who = f"model {type(reference).__name__!r}: {raised}"
    if isinstance(error, _OF_THE_MODEL):
        return f"{who} in evaluation mode, expected one that computes; the samples are not the cause"
    if _OF_TYPES.search(str(error)) and not _OF_INDICES.search(str(error)):
        return (
            f"{who}, expected float32 throughout; the samples are not the cause: create and convert tensors in forward with the "
            "type of the input (dtype=x.dtype), not with .double(), .half() or a type of their own"
        )
    if floats := _read_as_indices(error, x):
        return (
            f"{who} on samples of shape {shape!r}, expected integers where the model looks up or indexes; {floats}: pass "
            "those as x.astype('int64'), each under its own name or in the order of forward"
        )
    if tokens := _beyond_vocabulary(error, x):
        return (
            f"calibration: found samples of shape {shape!r}, on which the model {raised}; expected inputs as it was trained "
            f"with{tokens}"
        )
    inputs = model_inputs(reference) if isinstance(x, Tensor) else None
    others = " and on every other shape that was tried" if ONE in shapes else ""
    call = "model(x)" if ONE in shapes else f"model({', '.join(f'{name}=...' for name in shapes)})"
    if hint := _other_shape(reference, x):
        return (
            f"calibration: found samples of shape {shape!r}, on which the model {raised}; expected inputs as it was trained "
            f"with{hint}{hint_of_several(inputs)}"
        )
    return (
        f"{who} on samples of shape {shape!r}{others}, expected one that computes in evaluation "
        f"mode, without gradients, on float32 batches; where {call} runs in your code, pass such inputs{hint_of_several(inputs)}"
    )


def _check_device(model: nn.Module) -> None:
    """Refuse weights on another device than samples are."""
    for key, value in {**dict(model.named_buffers()), **dict(model.named_parameters())}.items():
        if value.device.type != "cpu":
            raise KanCompileError(
                f"model {type(model).__name__!r}: found {key!r} on {value.device}, expected the CPU; call model.cpu(), and mend "
                "code that moves tensors to a device of its own"
            )


def _other_shape(reference: Reference, x: Values) -> str:
    """Try other layouts and numbers of features, and say which the model takes; empty where it takes none of them."""
    if not isinstance(x, Tensor):
        return _other_dimensions(reference, x)
    if x.ndim < 2:
        return ""
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


def _without(reference: Reference, x: Values) -> str:
    """Try to leave one optional input out, such as labels, of which a model computes a loss of all samples."""
    inputs = model_inputs(reference)
    if isinstance(x, Tensor) or inputs is None:
        return ""
    for name in inputs.optional:
        if name in x.tensors and _takes(reference, NamedTensors({n: v for n, v in x.tensors.items() if n != name})):
            return f"; without {name!r} it does: leave it out, or name it 'y' where it holds labels to compare with"
    return ""


def _other_dimensions(reference: Reference, x: NamedTensors) -> str:
    """Try one of several inputs with a last dimension of 1 more, or less."""
    for name, value in x.tensors.items():
        tried = {"with a last dimension of 1: pass x[..., None]": value[..., None]}
        if value.ndim > 1 and value.shape[-1] == 1:
            tried = {"without its last dimension: pass x[..., 0]": value[..., 0]}
        for how, other in tried.items():
            if _takes(reference, NamedTensors({**x.tensors, name: other})):
                return f"; it takes {name!r} {how}"
    return ""


def _sizes(reference: Reference) -> list[int]:
    """List what may be a number of features: the sizes of the weights, in their order."""
    tensors = reference.parameters() if isinstance(reference, nn.Module) else ()
    found = dict.fromkeys(size for value in tensors for size in reversed(value.shape) if size <= _LARGEST_SIZE)
    return list(found)[:_MOST_SIZES]


def _takes(reference: Reference, x: Values) -> bool:
    try:
        with evaluating(reference) as model, torch.no_grad():
            output = model(x)
    except Exception:  # user code may raise anything, and then this is not the shape
        return False
    return all(value.shape[:1] == torch.Size([len(x)]) for value in tensors_of(output))
