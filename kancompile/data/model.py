"""The user's model: built by a factory and put in evaluation mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data.evaluation_mode import evaluation_mode, set_evaluating
from kancompile.data.exported_file import load_exported
from kancompile.data.imported_objects import call_with, found_object
from kancompile.data.model_inputs import arguments
from kancompile.data.model_outputs import outputs_of
from kancompile.data.state_dict import _most_bytes, apply_state_dict, check_finite_weights, load_state_dict
from kancompile.errors import KanCompileError, parse_literal
from kancompile.ir import Values, by_name


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
        arguments = dict(factory_args or {})
        if checkpoint is None or arguments.keys() - {"base_fun"}:
            raise KanCompileError(
                "model 'pykan': expected --checkpoint with what saveckpt was given, such as model/0.1, and no factory arguments "
                "but base_fun"
            )
        from kancompile.data.pykan_checkpoint import load  # which reads state dicts with this module

        return load(checkpoint, **arguments)
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
    set_evaluating(model)
    return model


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
def evaluating(reference: Any) -> Iterator[Callable[[Values], Values]]:
    """Give the float model as a callable in evaluation mode, and restore its mode afterwards.

    What is given maps one tensor or inputs by name to one tensor or outputs by name; see
    :mod:`kancompile.data.model_inputs` and :mod:`kancompile.data.model_outputs`.

    Raises:
        KanCompileError: it cannot be called.
    """
    with _evaluating(reference) as model:

        def call(values: Values) -> Values:
            args, kwargs = arguments(reference, values)
            return outputs_of(model(*args, **kwargs), by_name(values, ["input"]))

        yield call


@contextmanager
def _evaluating(reference: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(reference, ExportedProgram):
        yield reference.module()
    elif isinstance(reference, nn.Module):
        with evaluation_mode(reference):
            yield reference
    elif callable(reference):
        yield reference
    else:
        weights = isinstance(reference, Mapping)
        raise KanCompileError(
            f"reference: found {type(reference).__name__}, expected a torch.nn.Module or an ExportedProgram"
            + ("; these are weights alone: build the model and call its load_state_dict" if weights else "")
        )


def parameter_bytes(model: Any) -> int | None:
    """Return what the parameters take as they are stored in a checkpoint; ``None`` where the model has none to count."""
    if isinstance(model, ExportedProgram):
        values = [value for name, value in model.state_dict.items() if name in set(model.graph_signature.parameters)]
    else:
        values = list(model.parameters()) if isinstance(model, nn.Module) else []
    return sum(value.numel() * value.element_size() for value in values) or None
