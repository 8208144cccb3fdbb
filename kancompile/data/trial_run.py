"""Try the user's model on two samples before anything is traced, and name the cause where it fails."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data.calibration import Calibration
from kancompile.data.entries import ONE
from kancompile.data.model import Reference, evaluating
from kancompile.data.model_inputs import check_arguments, in_order
from kancompile.errors import KanCompileError, error_source, reason
from kancompile.named_tensors import Values, by_name, tensors_of

# what no other samples would mend
_OF_THE_MODEL = (AttributeError, NameError, ImportError, NotImplementedError, KeyError, UnboundLocalError, SyntaxError)


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
    if isinstance(reference, nn.Module):
        _check_forward(reference)
    failures: list[tuple[bool, KanCompileError]] = []
    for typed in _typings(samples):
        try:
            _check_run(reference, typed)
        except KanCompileError as error:
            # numbers that an embedding does not know say more than that it does not read floats
            failures.append((not isinstance(error.__cause__, IndexError), error))
        else:
            return _ordered(reference, typed)
    raise min(failures, key=lambda failure: failure[0])[1]


def _ordered(reference: Reference, samples: Calibration) -> Calibration:
    first: Values = samples.samples[:1]
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
            _check_weights(reference)
            check_arguments(reference, x)
        line = error_source(error)
        where = f" in {line}" if line else ""
        if isinstance(error, _OF_THE_MODEL):
            raise KanCompileError(
                f"model {type(reference).__name__!r}: raises {type(error).__name__}{where} ({reason(error)}) in evaluation mode, "
                "expected one that computes; the samples are not the cause"
            ) from error
        tokens = _beyond_vocabulary(error, x)
        raise KanCompileError(
            f"calibration: found samples of shape {shape!r}, on which the model raises "
            f"{type(error).__name__}{where} ({reason(error)}); expected inputs as it was trained with"
            f"{tokens or _other_shape(reference, x)}"
        ) from error
    # a model that begins with reshape(-1, n_in) takes any multiple of n_in and answers for another number of samples
    for value in tensors_of(output):
        if value.shape[:1] != torch.Size([len(x)]):
            raise KanCompileError(
                f"calibration: found samples of shape {shape!r}, for {len(x)} of which the model returns shape "
                f"{tuple(value.shape)!r}; expected one row for each, so inputs as it was trained with{_other_shape(reference, x)}"
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


def _beyond_vocabulary(error: Exception, x: Values) -> str:
    """Say the range of whole numbers that an embedding refused."""
    if not isinstance(error, IndexError):
        return ""
    whole = {name: value for name, value in by_name(x, [""]).items() if not value.is_floating_point()}
    ranges = [
        f"{int(value.min())} ... {int(value.max())}{f' in {name!r}' if name else ''}" for name, value in whole.items()
    ]
    return f", here numbers of the model's vocabulary; found {', '.join(ranges)}" if ranges else ""


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


def _other_shape(reference: Reference, x: Values) -> str:
    """Try the usual other layouts of samples, and say which one the model takes; empty where it takes none of them."""
    if not isinstance(x, Tensor):
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
        try:
            with evaluating(reference) as model, torch.no_grad():
                output = model(other.contiguous())
        except Exception:  # user code may raise anything, and then this is not the layout
            continue
        if isinstance(output, Tensor) and output.shape[:1] == x.shape[:1]:
            return f"; it takes these {how}"
    return ""
