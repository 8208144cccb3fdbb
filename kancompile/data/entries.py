"""Which entries of a mapping, an ``.npz`` or a tuple are a model's inputs, and which one holds labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kancompile.data.model_inputs import ModelInputs
from kancompile.errors import KanCompileError

ONE = ""
"""Name of an only input, which needs none."""


@dataclass(frozen=True)
class Entries:
    """What is read of a mapping.

    Attributes:
        inputs: entry for each input, by its name.
        labels: entry of the labels, ``None`` where there is none.
        unread: other entries, which the model has no input for.
    """

    inputs: Mapping[str, str]
    labels: str | None
    unread: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """Every entry that is read."""
        return [*self.inputs.values(), *([self.labels] if self.labels is not None else [])]


def choose_entries(
    keys: Sequence[str], model: ModelInputs | None, key: str | None, label_key: str, name: str
) -> Entries:
    """Choose by names what is read.

    Of a model of one input: ``key``, or ``x``, or the only array beside the labels, or what carries the input's name. Of
    several: every one that carries an input's name, ``input.part`` for the parts of a dict; and where the model takes one dict
    or dataclass, all that is there.

    Args:
        keys: names of the entries.
        model: what the model takes, ``None`` where it is not known.
        key: entry that the user names.
        label_key: entry of the labels, where no input is called so.
        name: what errors call the data.

    Raises:
        KanCompileError: a name that is missing.
    """
    known = () if model is None else model.names
    labels = label_key if label_key in keys and label_key not in known else None
    if key is None and model is not None:
        others = [k for k in keys if k != labels]
        found = [k for k in keys if k.partition(".")[0] in (*known, model.rest)]
        if found and model.is_named:  # model(**batch)
            found = others
        missing = [n for n in model.required if n not in {k.partition(".")[0] for k in found}]
        if found and not missing and (len(found) > 1 or len(model.required) == 1):
            unread = tuple(k for k in others if k not in found) if len(known) > 1 else ()
            only = found == list(model.required[:1])
            return Entries({ONE: found[0]} if only else {k: k for k in found}, labels, unread)
        if len(model.required) > 1 or (not model.required and model.is_open):
            if model.is_open and not missing:
                return Entries({k: k for k in others}, labels)
            raise KanCompileError(
                f"{name}: found arrays {list(keys)!r}, expected {list(model.required)!r} as the model's forward names its "
                f"inputs; missing: {missing!r}"
            )
        if model.takes_parts or (len(others) > 1 and "x" not in keys and not model.takes_tensor):
            return Entries({k: k for k in others}, labels)
    return Entries({ONE: _one(keys, key, labels, name)}, labels)


def parts_of_tuple(item: Sequence[Any], model: ModelInputs | None, name: str) -> tuple[dict[str, Any] | None, Any]:
    """Take the tuple of a loader, or of the user, apart: inputs in the order of ``forward``, labels behind them.

    Returns:
        inputs by name, ``None`` where the model has not several; labels, ``None`` where there are none.

    Raises:
        KanCompileError: another number of parts than inputs.
    """
    if model is None or len(item) == 0:
        return None, None
    if len(item) == 2 and isinstance(item[0], tuple | list | Mapping) and not isinstance(item[1], Mapping):
        first = item[0]
        if isinstance(first, Mapping):
            return dict(flattened(first)), item[1]
        if first and isinstance(first[0], np.ndarray | Tensor):
            return _in_order(first, model, name), item[1]
    if len(model.required) < 2:
        return None, None
    if len(item) == len(model.names) + 1 or (len(item) == len(model.required) + 1 and not model.optional):
        return _in_order(item[:-1], model, name), item[-1]
    return _in_order(item, model, name), None


def hint_of_several(model: ModelInputs | None) -> str:
    """Say how several inputs are given to a model that takes one as well; empty for others."""
    if model is None or not (model.rest or (model.required and model.optional)):
        return ""
    parts = ["a", "b"] if model.rest else model.names[:2]
    return f"; several inputs are passed by name, or as (({', '.join(parts)}), labels), with None where there are no labels"


def flattened(item: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dicts and tuples, ``outer.inner`` by name; ``None`` is left out."""
    for key, value in item.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            yield from flattened(value, f"{front}{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], np.ndarray | Tensor):
            yield from flattened({str(n): part for n, part in enumerate(value)}, f"{front}{key}.")
        else:
            yield f"{front}{key}", value


def _in_order(parts: Sequence[Any], model: ModelInputs, name: str) -> dict[str, Any]:
    if model.rest:
        known = model.names[: len(parts)]
        names = [*known, *(f"{model.rest}.{number}" for number in range(len(parts) - len(known)))]
        return dict(zip(names, parts, strict=True))
    if len(model.required) == 1 and not model.optional:
        return {f"{model.required[0]}.{number}": part for number, part in enumerate(parts)}
    if not len(model.required) <= len(parts) <= len(model.names):
        raise KanCompileError(
            f"{name}: found {len(parts)} parts, expected {len(model.required)} inputs {list(model.required)!r} in the order of "
            "the model's forward, and labels behind them where there are any"
        )
    return {name: part for name, part in zip(model.names, parts, strict=False) if part is not None}


def _one(keys: Sequence[str], key: str | None, label_key: str | None, name: str) -> str:
    """Return which of several arrays holds the samples: ``key``, or ``x``, or the only one beside the labels."""
    if key is not None or "x" in keys:
        wanted = key or "x"
        if wanted in keys:
            return wanted
    else:
        wanted = "x"
        others = [candidate for candidate in keys if candidate != label_key]
        if len(others) == 1:
            return others[0]
    raise not_one(keys, wanted, name)


def not_one(keys: Sequence[str], wanted: str, name: str) -> KanCompileError:
    """Say that one of several arrays has to be named."""
    # samples are called as the option that names them, perhaps followed by their file
    called = name.partition(" ")[0].lstrip("-")
    option = f"--{called}-key NAME, in Python " if called in ("calibration", "data") else ""
    return KanCompileError(
        f"{name}: found arrays {list(keys)!r}, expected one named {wanted!r}; name it with {option}key="
    )
