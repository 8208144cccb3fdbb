"""The user's model: built by a factory, put in evaluation mode, and tried on samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data.calibration import Calibration
from kancompile.data.exported_file import load_exported
from kancompile.data.imported_objects import call_with, found_object
from kancompile.data.state_dict import _most_bytes, apply_state_dict, check_finite_weights, load_state_dict
from kancompile.errors import KanCompileError, parse_literal, reason


def load_model(
    spec: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    factory_args: Mapping[str, Any] | None = None,
    checkpoint_key: str | None = None,
    trust: bool = False,
) -> nn.Module | ExportedProgram:
    """Build a model in evaluation mode and load its weights.

    Args:
        spec: ``PACKAGE.MODULE:FACTORY``, ``path/to/file.py:FACTORY`` (a class, a function or a finished module), or the
            path of a ``.pt2`` file, which contains its weights. ``"pykan"`` is a model of that package, built from its
            checkpoint alone.
        checkpoint: file with the state dict; see :func:`load_state_dict`. For ``"pykan"`` what ``saveckpt`` was given; see
            ``kancompile.data.pykan_checkpoint``.
        factory_args: keyword arguments of the factory.
        checkpoint_key: entry of the checkpoint that holds the weights; see :func:`load_state_dict`.
        trust: whether a ``.pt2`` file may be opened: loading one can run any code that it holds.

    Raises:
        KanCompileError: a ``.pt2`` file that is not trusted, nothing there to import, the factory fails or returns no module, or
            the weights do not fit.
    """
    spec = os.fspath(spec)
    if spec == "pykan":
        if checkpoint is None or factory_args:
            raise KanCompileError(
                "model 'pykan': expected --checkpoint with what saveckpt was given, such as model/0.1, and no factory arguments"
            )
        from kancompile.data.pykan_checkpoint import load  # which reads state dicts with this module

        return load(checkpoint)
    if spec.endswith(".pt2"):
        if checkpoint is not None or factory_args:
            raise KanCompileError(
                f"model {spec!r}: found a checkpoint or factory arguments, but a .pt2 file needs none"
            )
        return load_exported(Path(spec), trust)
    model = _build(spec, dict(factory_args or {}))
    if checkpoint is not None:
        apply_state_dict(model, load_state_dict(checkpoint, checkpoint_key, _most_bytes(model)), str(checkpoint))
    check_finite_weights(model)
    return model.eval()


def parse_factory_args(items: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` items; values are Python literals (``[784, 64, 10]``, ``0.5``, ``True``) or plain words.

    Raises:
        KanCompileError: an item without ``=``, a key that is no name, a value that is neither.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.isidentifier():
            raise KanCompileError(f"factory argument {item!r}: expected NAME=VALUE, such as layers=[784,64,10]")
        try:
            found[key] = parse_literal(text.strip())
        except ValueError as error:
            if not text.replace("-", "_").replace(".", "_").isidentifier():
                raise KanCompileError(
                    f"factory argument {item!r}: {text!r} is no Python literal; quote strings, name='\"a b\"'"
                ) from error
            found[key] = text
    return found


def _build(spec: str, arguments: dict[str, Any]) -> nn.Module:
    where = f"model {spec!r}"
    with found_object(spec, "model", also=" or a path ending in .pt2") as factory:
        if isinstance(factory, nn.Module):
            if arguments:
                raise KanCompileError(f"{where}: found factory arguments {sorted(arguments)!r} for a finished module")
            return factory
        if not callable(factory):
            raise KanCompileError(f"{where}: found {type(factory).__name__}, expected a class or function")
        model = call_with(factory, arguments, f"{where}: the factory", "--factory-arg")
    if not isinstance(model, nn.Module):
        raise KanCompileError(f"{where}: the factory returned {type(model).__name__}, expected torch.nn.Module")
    return model


Reference = nn.Module | ExportedProgram | Callable[[Tensor], Any]


@contextmanager
def evaluating(reference: Any) -> Iterator[Callable[[Tensor], Any]]:
    """Give the float model as a callable in evaluation mode, and restore its mode afterwards.

    Raises:
        KanCompileError: it cannot be called.
    """
    if isinstance(reference, ExportedProgram):
        yield reference.module()
    elif isinstance(reference, nn.Module):
        training = [module for module in reference.modules() if module.training]
        reference.eval()
        try:
            yield reference
        finally:
            for module in training:
                module.training = True
    elif callable(reference):
        yield reference
    else:
        raise KanCompileError(
            f"reference: found {type(reference).__name__}, expected a torch.nn.Module or an ExportedProgram"
        )


def check_fits(reference: Reference, samples: Calibration) -> None:
    """Make sure that the model takes samples of this shape, before anything is traced.

    Raises:
        KanCompileError: it does not; the shape and the model's own words are named.
    """
    x = samples.samples[:2]
    try:
        with evaluating(reference) as model, torch.no_grad():
            output = model(x)
    except KanCompileError:
        raise
    except Exception as error:  # user code may raise anything
        raise KanCompileError(
            f"calibration: found samples of shape {samples.input_shape!r}, on which the model raises "
            f"{type(error).__name__} ({reason(error)}); expected inputs as it was trained with{_other_shape(reference, x)}"
        ) from error
    # a model that begins with reshape(-1, n_in) takes any multiple of n_in and answers for another number of samples
    if isinstance(output, Tensor) and output.shape[:1] != x.shape[:1]:
        raise KanCompileError(
            f"calibration: found samples of shape {samples.input_shape!r}, for {len(x)} of which the model returns shape "
            f"{tuple(output.shape)!r}; expected one row for each, so inputs as it was trained with{_other_shape(reference, x)}"
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
