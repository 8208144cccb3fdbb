"""What declares a key of a recipe and what checks its value."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from kancompile.errors import KanCompileError, shown


def declared(default: Any, meaning: str, **rule: Any) -> Any:
    """Declare a key: its default, what it means, and its rule.

    A rule is ``choices``, or ``low``/``high`` with ``kind`` and ``names`` that stand beside the numbers, or ``read``, which
    checks and returns a value, with what is ``expected``. A ``late`` key came when files held recipes already: plain data holds
    it only where it is set, so that those of earlier recipes, and their hashes, stay what they were.
    """
    return field(default=default, metadata={"meaning": meaning, **rule})


def allowed(rule: Mapping[str, Any]) -> str:
    """Say in words which values a rule allows."""
    if "expected" in rule:
        return str(rule["expected"])
    if "choices" in rule:
        return ", ".join(rule["choices"])
    others = [*rule.get("names", ()), *(["unset"] if rule.get("optional") else [])]
    return " or ".join([f"{rule['low']} to {rule['high']}", *others])


def in_toml(value: Any) -> str:
    """Write a value in one line of TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {in_toml(part)}" for key, part in value.items()) + " }"
    return json.dumps(value)


def checked_value(key: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """Return a value that follows the rule of its key, whole numbers of a real key as floats.

    Raises:
        KanCompileError: it does not.
    """
    if value is None and rule.get("optional"):
        return None
    if "read" in rule:
        return rule["read"](value)
    if "choices" in rule:
        if value not in rule["choices"]:
            near = difflib.get_close_matches(value, rule["choices"], 1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KanCompileError(f"recipe: {key} is {shown(value)}, expected one of {list(rule['choices'])!r}{hint}")
        return value
    if isinstance(value, str) and value in rule.get("names", ()):
        return value
    whole = rule.get("kind") is int
    numeric = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not numeric or not rule["low"] <= value <= rule["high"]:
        kind = "an integer" if whole else "a number"
        raise KanCompileError(f"recipe: {key} is {shown(value)}, expected {kind} {allowed(rule)}")
    return value if whole else float(value)
