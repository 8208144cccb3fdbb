"""What a model's forward takes: the names of its inputs, and how tensors by name become its arguments."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from kancompile.data.model_outputs import named_leaves
from kancompile.errors import KanCompileError
from kancompile.ir import NamedTensors, Values, by_name

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class ModelInputs:
    """Names of a model's inputs, in order.

    Attributes:
        required: those that a call must give.
        optional: those with a default.
        is_open: whether it takes others as well, by ``*args`` or ``**kwargs``.
        rest: name of ``*args``, empty where there is none.
        is_named: whether others are taken by name, by ``**kwargs``.
        takes_parts: whether its only input is a dict, a dataclass or a tuple by its annotation.
        takes_tensor: whether its only input is a tensor by its annotation.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    is_open: bool = False
    takes_parts: bool = False
    rest: str = ""
    is_named: bool = False
    takes_tensor: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (*self.required, *self.optional)


def model_inputs(model: Any) -> ModelInputs | None:
    """Read the inputs of a module or an exported program; ``None`` where nothing says them, as of a path.

    Raises:
        KanCompileError: there is none.
    """
    model = unwrapped(model)
    if isinstance(model, ExportedProgram):
        found = ModelInputs(tuple(name for name in model.graph_signature.user_inputs if isinstance(name, str)))
    elif isinstance(model, nn.Module):
        parameters = _parameters(model)
        if parameters is None:
            return None
        plain = [p for p in parameters if p.kind not in _VARIABLE]
        required = tuple(p.name for p in plain if p.default is p.empty)
        optional = tuple(p.name for p in plain if p.default is not p.empty)
        takes_parts = len(required) == 1 and _is_structure(_annotation(model, plain[0]))
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        is_named = any(p.kind is p.VAR_KEYWORD for p in parameters)
        is_tensor = len(required) == 1 and _annotation(model, plain[0]) is Tensor
        is_open = len(plain) < len(parameters)
        found = ModelInputs(required, optional, is_open, takes_parts, rest, is_named, is_tensor)
        if not required and optional and not found.is_open:  # forward(x=None) is called with x nevertheless
            found = ModelInputs(optional[:1], optional[1:])
    else:
        return None
    if not found.names and not found.is_open:
        raise KanCompileError(
            f"model {type(model).__name__!r}: found no tensor input in forward, expected at least one; a network without inputs "
            "is a constant"
        )
    return found


def unwrapped(model: Any) -> Any:
    """Take off the wrapper of ``torch.compile`` or for several devices: what it holds is the model."""
    while True:
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(model, nn.Module) or not isinstance(inner, nn.Module):
            return model
        model = inner


def in_order(model: Any, values: Values) -> Values:
    """Give inputs by name in the order in which the model takes them.

    Raises:
        KanCompileError: names that the model does not have, or others that it needs.
    """
    if isinstance(values, Tensor):
        return values
    args, kwargs = arguments(model, values)
    name_of = {id(value): name for name, value in values.tensors.items()}
    leaves = [leaf for _, leaf in named_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return NamedTensors({name_of[id(leaf)]: leaf for leaf in leaves})


def arguments(model: Any, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the arguments of a call: by parameters of ``forward``; of one that takes a dict or dataclass, its entries.

    Raises:
        KanCompileError: names that the model does not have, or others that it needs.
    """
    if isinstance(values, Tensor):
        return (values,), {}
    tensors = dict(values.tensors)
    if isinstance(model, ExportedProgram):
        names = [name for name in model.graph_signature.user_inputs if isinstance(name, str)]
        _expect(model, tensors, names, names)
        args, kwargs = pytree.tree_unflatten([tensors[name] for name in names], model.call_spec.in_spec)
        return tuple(args), dict(kwargs)
    parameters = _parameters(model)
    if parameters is None or isinstance(model, fx.GraphModule):
        return tuple(tensors.values()), {}
    known = {p.name: p for p in parameters if p.kind not in _VARIABLE}
    required = [p.name for p in known.values() if p.default is p.empty]
    heads = dict.fromkeys(name.partition(".")[0] for name in tensors)
    if len(required) == 1 and not set(heads) & {p.name for p in parameters}:
        return (_whole(tensors, known[required[0]], model),), {}
    kinds = {p.kind: p.name for p in parameters}
    rest = kinds.get(inspect.Parameter.VAR_POSITIONAL)
    if rest is not None and (rest in heads or inspect.Parameter.VAR_KEYWORD not in kinds):
        others = tuple(value for name, value in tensors.items() if name.partition(".")[0] not in known)
        tensors = {name: value for name, value in tensors.items() if name.partition(".")[0] in known}
        heads = {head: None for head in heads if head in known}
    else:
        others = ()
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        _expect(model, heads, list(known), required)
    given = {
        head: tensors[head]
        if head in tensors
        else _whole(
            {name[len(head) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{head}.")},
            known.get(head),
            model,
        )
        for head in heads
    }
    if others:
        return (*(given[name] for name in known if name in given), *others), {}
    bound = inspect.signature(model.forward).bind(**given)
    return bound.args, bound.kwargs


def dynamic_dimensions(
    model: nn.Module, args: Any, kwargs: Any, values: Values, dynamic: Mapping[str, Mapping[int, str]] | None = None
) -> Any:
    """Say the dynamic dimensions of every tensor among the arguments, as ``torch.export`` wants it: the batch, and others.

    Args:
        model, args, kwargs: the call.
        values: the tensors among the arguments, by name where they are several.
        dynamic: names of dimensions beside the batch, by input and number; equal names are equal sizes.
    """
    shapes = torch.export.ShapesCollection()
    names = {id(value): name for name, value in by_name(values, ["input"]).items()}
    made = {"batch": torch.export.Dim("batch")}
    for _, leaf in named_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            called = {0: "batch", **(dynamic or {}).get(names.get(id(leaf), ""), {})}
            shapes[leaf] = {dim: made.setdefault(size, torch.export.Dim(size)) for dim, size in called.items()}
    return shapes.dynamic_shapes(model, args, kwargs)


@contextmanager
def named_forward(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Give ``forward(**kwargs)`` the names that are passed; ``torch.export`` takes no dynamic shapes without them."""
    forward = model.forward
    plain = [p for p in _parameters(model) or () if p.kind not in _VARIABLE]
    if set(kwargs) <= {p.name for p in plain}:
        yield
        return

    def named(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in kwargs
        if name not in {p.name for p in plain}
    ]
    named.__signature__ = inspect.Signature([*plain, *extra])  # type: ignore[attr-defined]
    before = vars(model).get("forward")
    model.forward = named  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def register_dataclasses(value: Any) -> None:
    """Let ``torch.export`` look into the dataclasses, and the mappings of own classes, that a model takes and returns."""
    kind = type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if kind not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        if kind not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                kind,
                lambda held: (list(held.values()), list(held)),
                lambda values, keys: _filled(kind, dict(zip(keys, values, strict=True))),
                flatten_with_keys_fn=lambda held: (
                    [(pytree.MappingKey(key), entry) for key, entry in held.items()],
                    list(held),
                ),
            )
        value = list(value.values())
    if isinstance(value, tuple | list):
        for entry in value:
            register_dataclasses(entry)


def check_arguments(model: nn.Module, values: Values) -> None:
    """Refuse a forward that cannot be called with the inputs at hand, before longer words of whoever calls it.

    Raises:
        KanCompileError: it needs others.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a compiled forward has none
        return
    args, kwargs = arguments(model, values)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise KanCompileError(
            f"model {type(model).__name__!r}: found forward{signature} and data of one array, expected an array for every input "
            f"({error}); pass them by name, {{{', '.join(f'{name!r}: ...' for name in signature.parameters)}}}, as an .npz with "
            "those names, or batches of tuples in that order"
        ) from None


def _whole(parts: Mapping[str, Tensor], parameter: inspect.Parameter | None, model: Any) -> Any:
    """Make one argument of its parts: a dataclass, named tuple or mapping as annotated, a tuple of numbered ones, else a dict."""
    kind = None if parameter is None else _annotation(model, parameter)
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        try:
            return kind(**parts)
        except TypeError as error:
            fields = [*getattr(kind, "_fields", ()), *getattr(kind, "__dataclass_fields__", ())]
            raise KanCompileError(
                f"model {type(model).__name__!r}: found data named {list(parts)!r}, expected the "
                f"fields {fields!r} of {kind.__name__}"
            ) from error
    if list(parts) == [str(number) for number in range(len(parts))]:
        return tuple(parts.values())
    own = isinstance(kind, type) and issubclass(kind, Mapping) and not inspect.isabstract(kind)
    return _filled(kind, parts) if own else dict(parts)


def _filled(kind: Any, entries: Mapping[str, Any]) -> Any:
    """Make a mapping of a class without its constructor, which may take anything."""
    made = kind.__new__(kind) if issubclass(kind, dict) else kind()
    for key, entry in entries.items():
        made[key] = entry
    return made


def _annotation(model: nn.Module, parameter: inspect.Parameter) -> Any:
    """Give the type that a parameter is annotated with, a type where it is written as text and can be found."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return typing.get_type_hints(type(model).forward).get(parameter.name)
    except Exception:  # names that only a type checker imports
        return None


def _is_structure(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and (issubclass(origin, Mapping | tuple | list) or dataclasses.is_dataclass(origin))


def _expect(
    model: Any, found: Sequence[str] | Mapping[str, Any], known: Sequence[str], required: Sequence[str]
) -> None:
    missing, strange = [n for n in required if n not in found], [n for n in found if n not in known]
    if missing or strange:
        raise KanCompileError(
            f"model {type(model).__name__!r}: found inputs {list(found)!r}, expected {list(required)!r}"
            + (f" and perhaps {[n for n in known if n not in required]!r}" if len(known) > len(required) else "")
            + "; name the arrays as forward names its inputs"
        )


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a compiled forward has none
        return None
