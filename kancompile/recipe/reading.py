"""Read recipes from mappings and files, and list their keys."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kancompile.errors import KanCompileError, check_depth, foreign, naming_file, parse_json, read_text
from kancompile.recipe.choices import Recipe, checked_layers
from kancompile.recipe.keys import allowed, checked_value
from kancompile.recipe.layer_choices import check_keys

_MOST_BYTES = 1 << 20
# a TOML reader takes time for the square of the parts of a key, a recipe has three at most
_LONG_KEY = re.compile(r"""(?:(?:(?<![\w-])[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")


def read_recipe(source: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None, **overrides: Any) -> Recipe:
    """Make a recipe from a mapping or a ``.toml`` or ``.json`` file; keyword arguments have the last word.

    Args:
        source: keys and values, a file of them, a finished recipe, or ``None`` for the defaults.
        overrides: keys set here win over ``source``, except inside its ``layers``; ``layers`` given here are appended.

    Raises:
        KanCompileError: unreadable file, unknown key (the nearest valid one is named), or value out of range.
    """
    if source is None:
        given: dict[str, Any] = {}
    elif isinstance(source, Recipe):
        given = source.to_dict() | {"layers": source.layers}  # a pattern may stand there twice
    elif isinstance(source, str | os.PathLike):
        given = _read_file(Path(source))
    elif isinstance(source, Mapping):
        given = dict(source)
    else:
        raise KanCompileError(f"recipe: found {type(source).__name__}, expected a mapping or a .toml or .json path")
    with naming_file(source):
        layers: tuple[Any, ...] = checked_layers(given.pop("layers", ()))
        check_keys(given, Recipe, "recipe")
        rules = {option.name: option.metadata for option in fields(Recipe)}
        given = {key: checked_value(key, value, rules[key]) for key, value in given.items()}
    layers = (*layers, *checked_layers(overrides.pop("layers", ())))
    check_keys(overrides, Recipe, "recipe")
    with naming_file(None if overrides else source):  # what does not fit together may come from either
        return Recipe(**given | overrides, layers=layers)


def describe_keys() -> list[tuple[str, str, str, str]]:
    """List every key as ``(name, default, allowed values, meaning)``, for help texts."""
    return [
        (option.name, json.dumps(option.default), allowed(option.metadata), option.metadata["meaning"])
        for option in fields(Recipe)
        if option.metadata
    ]


def _read_file(path: Path) -> dict[str, Any]:
    where, way_out = f"recipe {str(path)!r}", "give a .toml or .json file"
    text = read_text(path, where, way_out, _MOST_BYTES)
    if path.suffix not in (".toml", ".json"):
        raise KanCompileError(f"{where}: found suffix {path.suffix!r}, expected '.toml' or '.json'")
    with foreign(where, f"expected valid {path.suffix[1:].upper()}"):
        if path.suffix == ".toml" and _LONG_KEY.search(text):
            raise KanCompileError(
                f"{where}: found a key of many parts, expected at most layers.NAME.KEY; quote names with dots"
            )
        content = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
        check_depth(content)
    if not isinstance(content, dict):
        raise KanCompileError(f"{where}: found a {type(content).__name__}, expected a JSON object")
    return content
