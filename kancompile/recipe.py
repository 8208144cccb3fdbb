"""Recipes: every choice of a compilation, checked when it is made, overridable per layer, from Python, TOML or JSON."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kancompile.errors import KanCompileError, check_depth, foreign, parse_json, read_text, shown


@dataclass(frozen=True)
class CpuPreset:
    """A class of processors.

    Attributes:
        name: how recipes call it.
        int16_pairs: whether some of its kernels add two products in a saturating int16, so that the file must not let any
            sum of two neighbouring products leave it (see ``pair_products``).
        meaning: one line for people.
    """

    name: str
    int16_pairs: bool
    meaning: str


CPU_PRESETS: dict[str, CpuPreset] = {
    preset.name: preset
    for preset in (
        CpuPreset("portable", True, "the same outputs on every processor: x86 of any age, ARM, WebAssembly"),
        CpuPreset("x86-vnni", False, "x86 with AVX-512 VNNI or AVX-VNNI (servers from 2019, desktops from 2021)"),
        CpuPreset("x86-avx2", True, "x86 with AVX2 or AVX-512 and no VNNI (from 2013)"),
        CpuPreset("arm64", False, "64-bit ARM"),
    )
}


PRECISIONS = ("int8", "int16", "float")
METHODS = ("uniform", "gptq", "awq", "awq+gptq", "adaround", "awq+adaround", "brecq", "hawq-v2")
RANGES = ("minmax", "percentile", "mse")
GRANULARITIES = ("channel", "branch", "group")
STORAGES = ("smallest", "native", "fastest")
LOWERINGS = ("table", "keep")
LOOKUPS = ("auto", "each", "joint")
_SHARED_ERROR, _JOINT_ERROR = 1e-5, 3e-4

Rows = tuple[tuple[str, Any], ...]

_MOST_BYTES = 1 << 20
# a TOML reader takes time for the square of the parts of a key, a recipe has three at most
_LONG_KEY = re.compile(r"""(?:(?:(?<![\w-])[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){16}""")


def _option(default: Any, meaning: str, **rule: Any) -> Any:
    """Declare a key: its default, what it means, and its rule (``choices``, or ``low``/``high`` with ``kind``)."""
    return field(default=default, metadata={"meaning": meaning, **rule})


@dataclass(frozen=True)
class LayerRecipe:
    """What may differ from layer to layer.

    Raises:
        KanCompileError: a value has the wrong type or lies outside its range.
    """

    method: str = _option(
        "auto",
        "how weights are rounded, auto: uniform with 8 bits, awq+gptq with fewer; hawq-v2: auto, with weight_bits allocated "
        "to layers on average",
        choices=("auto", *METHODS),
    )
    weight_bits: int = _option(8, "bits of a stored weight", kind=int, low=2, high=8)
    levels: int | None = _option(
        None, "rows of a table, unset: chosen by measured error", kind=int, low=4, high=65536, optional=True
    )
    range: str = _option("mse", "how the input range of a table is chosen", choices=RANGES)
    percentile: float = _option(99.99, "share of inputs inside the range, for range = percentile", low=50.0, high=100.0)
    granularity: str = _option(
        "channel",
        "which weights share a scale; groups cost no time with 2 and 3 bits, a product each with more",
        choices=GRANULARITIES,
    )
    group_size: int | None = _option(
        None, "inputs that share a scale, for granularity = group", kind=int, low=1, high=1 << 20, optional=True
    )
    column_scaling: float | None = _option(
        None,
        "exponent of the column maximum that moves from table to weights, unset: chosen by measured error",
        low=0.0,
        high=1.0,
        optional=True,
    )
    function_error: float | None = _option(
        None,
        "share of a layer's output variance that looking up fewer functions may cost, unset: 1e-5 for convolutions, 3e-4 where "
        "inputs are looked up in pairs; 0: keep all functions",
        low=0.0,
        high=1e-2,
        optional=True,
    )
    lookup: str = _option(
        "auto",
        "whether each input is looked up by itself, or joint: pairs of inputs and few functions of them; auto: the faster",
        choices=LOOKUPS,
    )
    precision: str = _option(
        "int8",
        "integer kernels, 16-bit tables and weights in float arithmetic, or an exact float lowering",
        choices=PRECISIONS,
    )
    lowering: str = _option("table", "whether a layer becomes an integer table or is kept in float", choices=LOWERINGS)

    @property
    def arithmetic(self) -> str:
        """In which form the layer computes: its precision, or ``"keep"`` as PyTorch computes it."""
        return "keep" if self.lowering == "keep" else self.precision

    @property
    def shared_error(self) -> float:
        """Share of a convolution's output variance that may be lost where all channels share fewer functions."""
        return _SHARED_ERROR if self.function_error is None else self.function_error

    @property
    def joint_error(self) -> float:
        """Share of a layer's output variance that may be lost where inputs are looked up in pairs; 0: they are not."""
        if (
            self.lookup == "each"
            or self.granularity != "channel"
            or (self.levels is not None and self.lookup == "auto")
        ):
            return 0.0
        return _JOINT_ERROR if self.function_error is None else self.function_error

    @property
    def rounding_method(self) -> str:
        """Name of the method that rounds, with ``"auto"`` and ``"hawq-v2"`` (which says how bits are chosen) resolved."""
        if self.method not in ("auto", "hawq-v2"):
            return self.method
        return "uniform" if self.weight_bits == 8 else "awq+gptq"

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.metadata:
                checked = _checked(option.name, getattr(self, option.name), option.metadata)
                object.__setattr__(self, option.name, checked)
        if (self.granularity == "group") != (self.group_size is not None):
            raise KanCompileError(
                f"recipe: found granularity {self.granularity!r} with group_size {self.group_size!r}, expected "
                "granularity 'group' and a group_size together, or neither"
            )


@dataclass(frozen=True)
class Recipe(LayerRecipe):
    """All choices of one compilation: defaults for every layer, overrides by layer pattern, and global ones.

    Attributes:
        storage: ``"smallest"`` keeps as many bits as a weight has, ``"native"`` the narrowest ONNX type that holds them,
            ``"fastest"`` int8.
        cpu: name of a preset in :data:`CPU_PRESETS`.
        bits_average, max_bytes, max_latency_us: budgets; the first two have bits allocated by sensitivity.
        batch: the only batch size of the file, ``None`` for any.
        for_batch: the batch size at which time counts, ``None`` for a balance of small and large ones.
        goal_sqnr: what every output should reach, and is helped to (see ``kancompile.compiler.error_gate``); ``None``: no help.
        min_sqnr: what every output must reach, or the compilation fails.
        calibration_samples: how many samples are used at most.
        layers: ``(pattern, overrides)`` in order; ``fnmatch`` patterns, the last match of a key wins. Given as a
            mapping, kept as tuples so that a recipe is immutable and hashable.
    """

    storage: str = _option(
        "smallest",
        "weights in the file, smallest: int4 or bit planes; native: tensors of int2, int4 or int8; fastest to load: int8",
        choices=STORAGES,
    )
    cpu: str = _option(
        "portable",
        "processors that must compute the same as the simulation; portable: all",
        choices=tuple(CPU_PRESETS),
    )
    bits_average: float | None = _option(
        None,
        "weight bits that all layers may take on average; their bits are then allocated",
        low=2,
        high=8,
        optional=True,
    )
    max_bytes: int | None = _option(
        None, "bytes that the file may take; bits are then allocated", kind=int, low=1, high=1 << 40, optional=True
    )
    max_latency_us: float | None = _option(
        None,
        "microseconds that one sample may take on this machine, in one thread",
        low=0.001,
        high=1e9,
        optional=True,
    )
    batch: int | None = _option(
        None, "the only batch size that the file takes, unset: any", kind=int, low=1, high=1 << 20, optional=True
    )
    goal_sqnr: float | None = _option(
        30.0,
        "dB that every output should reach about its mean (20 with fewer than 8 bits): other rounding and finer tables are "
        "tried until it does, 16 bits only below 12 dB; unset: nothing is tried",
        low=-1000.0,
        high=1000.0,
        optional=True,
    )
    min_sqnr: float | None = _option(
        None,
        "dB that every output must reach about its mean, or nothing is written; layers go on to 16 bits and float for it",
        low=-1000.0,
        high=1000.0,
        optional=True,
    )
    for_batch: int | None = _option(
        None,
        "the batch size that the file is made for, which takes any; unset: a balance of 1, 16 and 256",
        kind=int,
        low=1,
        high=1 << 20,
        optional=True,
    )
    calibration_samples: int = _option(4096, "calibration samples used at most", kind=int, low=2, high=1 << 24)
    layers: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _checked_layers(self.layers))

    @property
    def allocated_bits(self) -> float | None:
        """Average bits to be allocated to layers, ``None`` where only ``max_bytes`` or nothing asks for an allocation."""
        if self.bits_average is None and self.max_bytes is None and self.method == "hawq-v2":
            return float(self.weight_bits)
        return self.bits_average

    def _defaults(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(LayerRecipe)}

    def for_layer(self, name: str) -> LayerRecipe:
        """Return the choices for one layer."""
        chosen = self._defaults()
        for pattern, overrides in self.layers:
            if fnmatchcase(name, pattern):
                if dict(overrides).get("granularity", "group") != "group":
                    chosen["group_size"] = None  # TOML has no way to unset the general one
                chosen.update(overrides)
        try:
            return LayerRecipe(**chosen)
        except KanCompileError as error:
            raise KanCompileError(f"{error} (for layer {name!r})") from error

    def with_bits(self, bits_of: Mapping[str, int]) -> Recipe:
        """Return the recipe with the bits of some layers set, whatever its patterns say."""
        return self.with_overrides({name: {"weight_bits": bits} for name, bits in bits_of.items()})

    def with_overrides(self, overrides: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """Return the recipe with some keys of some layers set, whatever its patterns say.

        A layer that has a pattern of its own already keeps one, so that a file can hold the result.
        """
        exact = {}
        for name, keys in overrides.items():
            earlier = {key for pattern, rows in self.layers if pattern == _escaped(name) for key, _ in rows}
            now = self.for_layer(name) if earlier else self
            exact[_escaped(name)] = {key: getattr(now, key) for key in earlier} | dict(keys)
        kept = tuple(entry for entry in self.layers if entry[0] not in exact)
        return replace(self, layers=(*kept, *((name, tuple(sorted(keys.items()))) for name, keys in exact.items())))

    def check_layers(self, names: Iterable[str]) -> None:
        """Verify that every pattern matches a layer, so that no typing error goes unnoticed.

        Raises:
            KanCompileError: a pattern matches none of ``names``, or the overrides of a layer do not fit together.
        """
        names = list(names)
        for pattern, _ in self.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise KanCompileError(
                    f"recipe: pattern {pattern!r} matches no layer, expected one of {names!r} or a pattern such as '*'"
                )
        for name in names:
            self.for_layer(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`read_recipe` turns back into an equal recipe."""
        plain = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "layers"}
        return plain | {"layers": {pattern: dict(overrides) for pattern, overrides in self.layers}}

    def canonical_json(self) -> str:
        """Write the recipe in one fixed form, for hashing; layer patterns keep their order, which has a meaning."""
        plain = self.to_dict() | {"layers": [[pattern, dict(overrides)] for pattern, overrides in self.layers]}
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    def sha256(self) -> str:
        """Hash the canonical form."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_toml(self, with_meanings: bool = False) -> str:
        """Write the recipe as TOML, with a comment for every key where wanted; unset keys become comments."""
        lines = []
        for option in fields(self):
            if option.name == "layers":
                continue
            if with_meanings:
                lines.append(f"# {option.metadata['meaning']}: {_allowed(option.metadata)}")
            value = getattr(self, option.name)
            lines.append(f"# {option.name} = ..." if value is None else f"{option.name} = {json.dumps(value)}")
        for pattern, overrides in self.layers:
            lines += ["", f"[layers.{json.dumps(pattern)}]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in overrides]
        return "\n".join(lines) + "\n"


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
    layers = (*_checked_layers(given.pop("layers", ())), *_checked_layers(overrides.pop("layers", ())))
    given |= overrides
    _check_keys(given, Recipe, "recipe")
    return Recipe(**given, layers=layers)


def _escaped(name: str) -> str:
    """Turn a layer name into a pattern that matches nothing else."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def describe_keys() -> list[tuple[str, str, str, str]]:
    """List every key as ``(name, default, allowed values, meaning)``, for help texts."""
    return [
        (option.name, json.dumps(option.default), _allowed(option.metadata), option.metadata["meaning"])
        for option in fields(Recipe)
        if option.metadata
    ]


def _allowed(rule: Mapping[str, Any]) -> str:
    if "choices" in rule:
        return ", ".join(rule["choices"])
    return f"{rule['low']} to {rule['high']}" + (" or unset" if rule.get("optional") else "")


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


def _checked_layers(layers: Any) -> tuple[tuple[str, Rows], ...]:
    entries = list(layers.items()) if isinstance(layers, Mapping) else layers
    if not isinstance(entries, list | tuple):
        raise KanCompileError(f"recipe: found layers of type {type(layers).__name__}, expected pattern: overrides")
    checked = []
    for entry in entries:
        pattern, overrides = entry if _is_pair(entry) else (entry, None)
        if isinstance(overrides, Mapping) or (isinstance(overrides, tuple) and all(map(_is_row, overrides))):
            overrides = dict(overrides)
        if not isinstance(pattern, str) or not isinstance(overrides, dict):
            found = f"{shown(pattern)}: {shown(overrides)}" if _is_pair(entry) else shown(entry)
            raise KanCompileError(
                f"recipe: found layers {found}, expected a pattern and a table of overrides; "
                'in TOML quote patterns with dots, [layers."layers.0"]'
            )
        _check_keys(overrides, LayerRecipe, f"recipe layers {pattern!r}")
        if overrides.get("method") == "hawq-v2":
            raise KanCompileError(
                f"recipe layers {pattern!r}: method 'hawq-v2' divides bits between layers, so it holds for the whole model; "
                "set it outside layers, or give this layer weight_bits"
            )
        rules = {option.name: option.metadata for option in fields(LayerRecipe)}
        try:
            values = {key: _checked(key, value, rules[key]) for key, value in overrides.items()}
        except KanCompileError as error:
            raise KanCompileError(f"{error} (in layers {pattern!r})") from error
        checked.append((pattern, tuple(sorted(values.items()))))
    return tuple(checked)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2


def _is_row(entry: Any) -> bool:
    return _is_pair(entry) and isinstance(entry[0], str)


def _check_keys(given: Mapping[str, Any], kind: type[LayerRecipe], where: str) -> None:
    valid = [option.name for option in fields(kind)]
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 1)
            only_global = kind is LayerRecipe and key in {option.name for option in fields(Recipe)}
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {valid!r}"
            raise KanCompileError(
                f"{where}: unknown key {shown(key)}; "
                + ("it holds for the whole model, so set it outside layers" if only_global else hint)
            )


def _checked(key: str, value: Any, rule: Mapping[str, Any]) -> Any:
    if value is None and rule.get("optional"):
        return None
    if "choices" in rule:
        if value not in rule["choices"]:
            near = difflib.get_close_matches(value, rule["choices"], 1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise KanCompileError(f"recipe: {key} is {shown(value)}, expected one of {list(rule['choices'])!r}{hint}")
        return value
    whole = rule.get("kind") is int
    numeric = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not numeric or not rule["low"] <= value <= rule["high"]:
        kind = "an integer" if whole else "a number"
        raise KanCompileError(f"recipe: {key} is {shown(value)}, expected {kind} {_allowed(rule)}")
    return value if whole else float(value)
