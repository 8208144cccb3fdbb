"""What a model's forward returns, as tensors by name, whatever structure holds them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from kancompile.data.tensor_names import check_output_names
from kancompile.errors import KanCompileError
from kancompile.ir import NamedTensors, Values


def outputs_of(returned: Any, inputs: Collection[str] = ()) -> Values:
    """Give one tensor itself, several by name: keys, fields, ``output_0`` for the first entry of a tuple; ``None`` is left out.

    An output that has the name of one of the ``inputs``, such as a state that is fed back, is called ``h_1`` in place of ``h``.

    Raises:
        KanCompileError: something else than tensors was returned.
    """
    if isinstance(returned, Tensor):
        return returned
    found = {name: value for name, value in named_leaves(returned) if value is not None}
    strange = {name: type(value).__name__ for name, value in found.items() if not isinstance(value, Tensor)}
    if strange or not found:
        name, kind = next(iter(strange.items()), ("", "none"))
        raise KanCompileError(
            f"model: found an output{f' {name!r}' if name else ''} of {kind}, expected tensors; wrap the model to return "
            "tensors, in a tuple, a dict or a dataclass where they are several"
        )
    if len(found) == 1:
        only: Tensor = next(iter(found.values()))
        return only
    return NamedTensors(dict(zip(output_names(found, inputs), found.values(), strict=True)))


def output_names(names: Collection[str], inputs: Collection[str]) -> list[str]:
    """Tell outputs from inputs of the same name, since a name stands for one tensor in a file: ``h_1`` in place of ``h``.

    Raises:
        KanCompileError: a name that no file can hold.
    """
    check_output_names(names)
    taken, found = {*names, *inputs}, []
    for name in names:
        free = (f"{name}_{number}" for number in itertools.count(1))
        found.append(next(other for other in free if other not in taken) if name in inputs else name)
        taken.add(found[-1])
    return found


def named_leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what a structure of tuples, lists, dicts and dataclasses holds, with its name."""
    entries: list[tuple[str, Any]] | None = None
    if isinstance(value, Mapping):
        entries = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        entries = [(str(name), entry) for name, entry in zip(names, value, strict=True)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if entries is None:
        name = ".".join(path)
        yield (f"output_{name}" if not path or path[0].isdigit() else name), value
        return
    for key, entry in entries:
        yield from named_leaves(entry, (*path, key))
