"""What operators of ONNX Runtime cost on a kind of processor: data, by which passes choose between forms of a layer.

Not a clock decides, so equal models, recipes and profiles give equal files everywhere. A recipe holds the name of a profile of
the package, or all the costs of another, so that a file says what it was made by.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from kancompile.errors import KanCompileError, check_depth, foreign, read_text, shown

PROFILES = ("x86-vnni", "x86", "aarch64")
"""Names of the profiles that the package holds."""
_FOLDER = Path(__file__).with_name("cost_profiles")
_MOST_COST = 1e9
_MOST_BYTES = 1 << 16
_MOST_NAME = 64


def _ns(meaning: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"meaning": meaning})


def _operator(name: str) -> Any:
    return field(metadata={"meaning": f"an element of {name}", "operator": True})


@dataclass(frozen=True)
class LookUpCosts:
    """Nanoseconds of integer layers, one thread."""

    node: float = _ns("any node, whatever it does")
    quantize: float = _ns("an input that QuantizeLinear makes a row number of")
    gather: float = _ns("a row number that Gather looks up, cast included")
    gather_paired: float = _ns(
        "an input that is looked up together with its neighbor, joining their row numbers included"
    )
    product: float = _ns("an 8-bit product")
    load: float = _ns("a weight that is read, once a batch")
    pick: float = _ns("an input that is picked from a batch in columns, once a batch")
    word: float = _ns("a word of three codes that is looked up in columns, its index and its taking apart included")
    column: float = _ns("a code that is put in its place in a row of columns")
    code: float = _ns(
        "a code that is looked up in a column of its own, as of up to three functions of an input, cast included",
        default=1.6,
    )
    call: float = _ns("a call of a file, whatever it holds", default=5000.0)


@dataclass(frozen=True)
class FunctionCosts:
    """Nanoseconds of float and 16-bit layers, one thread, tensors larger than the second-level cache."""

    gather: float = _ns("a row number of a Gather")
    gathered: float = _ns("a float32 that a Gather copies")
    step: float = _ns("a value that is multiplied and added to")
    copy: float = _ns("a value that a product with zeros and ones copies to a column")
    elementwise: float = _ns("a value of an elementwise operator that finds cells")
    compare: float = _ns("a breakpoint that is compared with and counted")
    apart: float = _ns("a column of a layer whose functions are multiplied in two parts, and these added")
    run: float = _ns("a contiguous run of an operand that is broadcast")
    operation: float = _ns("an element of an operator that is not listed below")
    index: float = _operator("index, a selection by indices")
    pow: float = _operator("pow")
    gelu: float = _operator("gelu")
    erf: float = _operator("erf")
    log: float = _operator("log")
    sin: float = _operator("sin")
    cos: float = _operator("cos")
    tan: float = _operator("tan")
    acos: float = _operator("acos")
    asin: float = _operator("asin")
    atan: float = _operator("atan")
    sinh: float = _operator("sinh")
    cosh: float = _operator("cosh")
    asinh: float = _operator("asinh")
    acosh: float = _operator("acosh")
    atanh: float = _operator("atanh")

    def of_operator(self, name: str) -> float:
        """Give the cost of an element of an ATen operator."""
        cost: float = getattr(self, name) if name in OPERATORS else self.operation
        return cost


OPERATORS = tuple(cost.name for cost in fields(FunctionCosts) if "operator" in cost.metadata)
"""ATen operators that take longer than others."""


@dataclass(frozen=True)
class CostProfile:
    """Costs of operators on a kind of processor.

    Attributes:
        name: how recipes and manifests call it.
        look_up: of integer layers.
        functions: of float and 16-bit layers.

    Raises:
        KanCompileError: the name is no name, or that of a profile of the package with other costs.
    """

    name: str
    look_up: LookUpCosts
    functions: FunctionCosts

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`read_profile` turns back into an equal profile."""
        sections = {part: getattr(self, part) for part in _SECTIONS}
        return {"name": self.name} | {
            part: {cost.name: getattr(costs, cost.name) for cost in fields(costs)} for part, costs in sections.items()
        }

    def sha256(self) -> str:
        """Hash the costs, whatever their name."""
        costs = {part: values for part, values in self.to_dict().items() if part in _SECTIONS}
        return hashlib.sha256(json.dumps(costs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_toml(self, comments: str = "") -> str:
        """Write it as a file, with the meaning of every cost, behind comments of any number of lines."""
        lines = [f"# {line}".rstrip() for line in comments.splitlines()]
        lines += [f"name = {json.dumps(self.name)}"]
        for part, kind in _SECTIONS.items():
            lines += ["", f"# {(kind.__doc__ or '').rstrip('.')}", f"[{part}]"]
            costs = getattr(self, part)
            lines += [
                f"{cost.name} = {getattr(costs, cost.name)}  # {cost.metadata['meaning']}" for cost in fields(costs)
            ]
        return "\n".join(lines) + "\n"


_SECTIONS: dict[str, type[Any]] = {"look_up": LookUpCosts, "functions": FunctionCosts}


@functools.cache
def package_profile(name: str) -> CostProfile:
    """Read one of :data:`PROFILES`."""
    text = (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    return _checked(tomllib.loads(text), f"profile {name!r}")


def read_profile(source: CostProfile | Mapping[str, Any] | str | os.PathLike[str]) -> CostProfile:
    """Return the profile of a name, a mapping or a ``.toml`` file.

    Raises:
        KanCompileError: an unknown name, an unreadable file, or costs that are missing, unknown or no costs.
    """
    if isinstance(source, CostProfile):
        return source
    if isinstance(source, str) and source in PROFILES:
        return package_profile(source)
    if isinstance(source, Mapping):
        profile = _checked(source, "profile")
    elif isinstance(source, str | os.PathLike):
        profile = _read_file(Path(source))
    else:
        raise KanCompileError(
            f"profile: found {shown(source)}, expected one of {list(PROFILES)!r}, the path of a .toml file, or its content"
        )
    if profile.name in PROFILES and profile != package_profile(profile.name):
        raise KanCompileError(
            f"profile {profile.name!r}: found other costs than those of the package, which this name stands for; "
            "give it another name"
        )
    return profile


def name_or_profile(source: Any) -> str | CostProfile:
    """Keep the name of a profile of the package, and all costs of another, which no name would bring back elsewhere."""
    profile = read_profile(source)
    return profile.name if profile.name in PROFILES else profile


def _read_file(path: Path) -> CostProfile:
    who = f"profile {str(path)!r}"
    if path.suffix != ".toml":
        near = difflib.get_close_matches(str(path), PROFILES, 1)
        raise KanCompileError(
            f"{who}: found no profile of that name, expected one of {list(PROFILES)!r} or the path of a .toml file"
            + (f"; did you mean {near[0]!r}?" if near else "; kancompile profile --out FILE.toml measures this machine")
        )
    text = read_text(path, who, "kancompile profile --out FILE.toml writes one", _MOST_BYTES)
    with foreign(who, "expected valid TOML"):
        content = tomllib.loads(text)
        check_depth(content)
    return _checked(content, who)


def _checked(content: Mapping[str, Any], who: str) -> CostProfile:
    """Make a profile of plain data, every key checked."""
    _check_keys(content, ("name", *_SECTIONS), who)
    name = content["name"]
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME or not name.isprintable():
        raise KanCompileError(f"{who}: name is {shown(name)}, expected a short text")
    sections = {}
    for part, kind in _SECTIONS.items():
        costs, where = content[part], f"{who}, {part}"
        if not isinstance(costs, Mapping):
            raise KanCompileError(f"{where}: found {shown(costs)}, expected a table of costs in nanoseconds")
        # files of earlier versions do not have those with a default
        usual = {cost.name: cost.default for cost in fields(kind) if cost.default is not MISSING}
        costs = {**{key: value for key, value in usual.items() if key not in costs}, **costs}
        _check_keys(costs, tuple(cost.name for cost in fields(kind)), where)
        sections[part] = kind(**{key: _nanoseconds(value, f"{where}: {key}") for key, value in costs.items()})
    return CostProfile(name, **sections)


def _check_keys(content: Mapping[str, Any], expected: tuple[str, ...], who: str) -> None:
    unknown, missing = [key for key in content if key not in expected], [key for key in expected if key not in content]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), missing or expected, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {list(expected)!r}"
        raise KanCompileError(f"{who}: unknown key {shown(unknown[0])}; {hint}")
    if missing:
        raise KanCompileError(
            f"{who}: found no {', '.join(map(repr, missing))}, expected all of {list(expected)!r}; "
            "kancompile profile --out FILE.toml writes a whole one"
        )


def _nanoseconds(value: Any, who: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _MOST_COST:  # NaN is neither
        raise KanCompileError(f"{who} is {shown(value)}, expected nanoseconds above 0 and up to {_MOST_COST:g}")
    return float(value)
