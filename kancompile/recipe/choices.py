"""What a recipe holds, for every layer and for the whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from kancompile.errors import KanCompileError, shown
from kancompile.recipe.cost_profile import PROFILES, CostProfile, name_or_profile, read_profile
from kancompile.recipe.cpu_presets import CPU_PRESETS
from kancompile.recipe.keys import allowed, checked_value, declared, in_toml
from kancompile.recipe.layer_choices import LayerRecipe, check_keys

STORAGES = ("smallest", "native", "fastest")
GUARDS = ("off", "on")
OPTIMIZE = ("balanced", "size", "speed", "accuracy")
METADATA = ("auto", "full", "short")
DEFAULT_PROFILE = "x86-vnni"

Rows = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, repr=False)
class Recipe(LayerRecipe):
    """All choices of one compilation: defaults for every layer, overrides by layer pattern, and global ones.

    Attributes:
        storage: ``"smallest"`` keeps as many bits as a weight has, ``"native"`` the narrowest ONNX type that holds them,
            ``"fastest"`` int8.
        optimize: what bits and rows are chosen for (see ``kancompile.compiler.allocation``).
        metadata: how much a file says about itself.
        cpu: name of a preset in :data:`CPU_PRESETS`.
        bits_average, max_bytes, max_latency_us: budgets; the first has bits allocated by sensitivity, the others what
            ``kancompile.compiler.allocation`` chooses.
        batch: the only batch size of the file, ``None`` for any.
        guard_nan: whether NaN passes from the inputs of a sample to its outputs (see ``kancompile.passes.guard_nan``).
        for_batch: the batch size at which time counts, ``None`` for a balance of small and large ones.
        profile: name of a cost profile of the package, or another profile in full.
        goal_sqnr: what every output should reach, and is helped to (see ``kancompile.compiler.error_gate``); ``None``: no help.
        min_sqnr: what every output must reach, or the compilation fails.
        calibration_samples: how many samples are used at most.
        layers: ``(pattern, overrides)`` in order; ``fnmatch`` patterns, the last match of a key wins. Given as a
            mapping, kept as tuples so that a recipe is immutable and hashable.
    """

    storage: str = declared(
        "smallest",
        "weights in the file, smallest: int4 or bit planes; native: tensors of int2, int4 or int8; fastest to load: int8",
        choices=STORAGES,
    )
    optimize: str = declared(
        "balanced",
        "what bits and rows of layers are chosen for; size: the smallest file that holds goal_sqnr; speed: the same with rows "
        "that one kernel hands over; accuracy: the least error within max_bytes",
        choices=OPTIMIZE,
        late=True,
    )
    metadata: str = declared(
        "auto",
        "what the file says about itself; short: the calibrated range, and names of products alone, the manifest has the rest; "
        "auto: short with optimize = size",
        choices=METADATA,
        late=True,
    )
    cpu: str = declared(
        "portable",
        "processors that must compute the same as the simulation; portable: all",
        choices=tuple(CPU_PRESETS),
    )
    bits_average: float | None = declared(
        None,
        "weight bits that all layers may take on average; their bits are then allocated",
        low=2,
        high=8,
        optional=True,
    )
    max_bytes: int | None = declared(
        None,
        "bytes that the file may take; bits, rows and functions of layers are then chosen for the least error",
        kind=int,
        low=1,
        high=1 << 40,
        optional=True,
    )
    max_latency_us: float | None = declared(
        None,
        "microseconds that a call of one sample, or of for_batch, may take in one thread by the costs of profile; bits, rows and "
        "functions of layers are then chosen for the least error",
        low=0.001,
        high=1e9,
        optional=True,
    )
    batch: int | None = declared(
        None, "the only batch size that the file takes, unset: any", kind=int, low=1, high=1 << 20, optional=True
    )
    goal_sqnr: float | None = declared(
        30.0,
        "dB that every output should reach about its mean (20 with fewer than 8 bits): other rounding and finer tables are "
        "tried until it does, 16 bits only below 12 dB; unset: nothing is tried",
        low=-1000.0,
        high=1000.0,
        optional=True,
    )
    min_sqnr: float | None = declared(
        None,
        "dB that every output must reach about its mean, or nothing is written; layers go on to 16 bits and float for it",
        low=-1000.0,
        high=1000.0,
        optional=True,
    )
    guard_nan: str = declared(
        "off",
        "whether a sample with NaN among its inputs has outputs of NaN; off: a table reads NaN as its lowest input",
        choices=GUARDS,
        late=True,
    )
    for_batch: int | None = declared(
        None,
        "the batch size that the file is made for, which takes any; unset: a balance of 1, 16 and 256",
        kind=int,
        low=1,
        high=1 << 20,
        optional=True,
    )
    profile: str | CostProfile = declared(  # noqa: RUF009 (frozen, too)
        DEFAULT_PROFILE,
        "what operators cost where the file will run, by which the faster form of a layer is chosen",
        read=name_or_profile,
        expected=f"{', '.join(PROFILES)} or a .toml file of kancompile profile",
        late=True,
    )
    calibration_samples: int = declared(4096, "calibration samples used at most", kind=int, low=2, high=1 << 24)
    layers: Any = ()

    def __repr__(self) -> str:
        """Write what differs from the default as code."""
        given = {option.name: getattr(self, option.name) for option in fields(self)}
        changed = {option.name: given[option.name] for option in fields(self) if given[option.name] != option.default}
        if changed.get("layers"):
            changed["layers"] = {pattern: dict(overrides) for pattern, overrides in self.layers}
        return f"Recipe({', '.join(f'{key}={value!r}' for key, value in changed.items())})"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", checked_layers(self.layers))

    @property
    def allocated_bits(self) -> float | None:
        """Average bits to be allocated to layers, ``None`` where only ``max_bytes`` or nothing asks for an allocation."""
        if self.bits_average is None and self.max_bytes is None and self.method == "hawq-v2":
            return float(self.bits)
        return self.bits_average

    @property
    def has_short_metadata(self) -> bool:
        """Whether a file leaves out what its manifest says."""
        return self.metadata == "short" or (self.metadata == "auto" and self.optimize == "size")

    @property
    def costs(self) -> CostProfile:
        """What operators cost."""
        return read_profile(self.profile)

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

    def settled(self, names: Iterable[str]) -> SettledRecipe:
        """Settle the patterns for the layers of a program; where that begins, :meth:`check_layers` comes before.

        Raises:
            KanCompileError: the overrides of a layer do not fit together.
        """
        return SettledRecipe(self, {name: self.for_layer(name) for name in names})

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
            KanCompileError: a pattern matches none of ``names``.
        """
        names = list(names)
        for pattern, _ in self.layers:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise KanCompileError(
                    f"recipe: pattern {pattern!r} matches no layer, expected one of {names!r} or a pattern such as '*'"
                )

    def _plain(self, option: Field[Any]) -> Any:
        value = getattr(self, option.name)
        return value.to_dict() if isinstance(value, CostProfile) else value

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`read_recipe` turns back into an equal recipe."""
        keys = [option for option in fields(self) if option.name != "layers"]
        said = [key for key in keys if not (key.metadata.get("late") and getattr(self, key.name) == key.default)]
        plain = {key.name: self._plain(key) for key in said}
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
                lines.append(f"# {option.metadata['meaning']}: {allowed(option.metadata)}")
            value = self._plain(option)
            lines.append(f"# {option.name} = ..." if value is None else f"{option.name} = {in_toml(value)}")
        for pattern, overrides in self.layers:
            lines += ["", f"[layers.{json.dumps(pattern)}]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in overrides]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SettledRecipe:
    """A recipe with what it chooses for every layer of a program; ``recipe[name]`` is that of one layer.

    Attributes:
        whole: the recipe, as files hold it.
        layers: choices by the names of layers.
    """

    whole: Recipe
    layers: Mapping[str, LayerRecipe]

    def __getitem__(self, name: str) -> LayerRecipe:
        return self.layers[name]

    def with_overrides(self, overrides: Mapping[str, Mapping[str, Any]]) -> SettledRecipe:
        """Return the recipe with some keys of some layers set; only these are settled again."""
        whole = self.whole.with_overrides(overrides)
        return SettledRecipe(whole, {**self.layers, **{name: whole.for_layer(name) for name in overrides}})


def _escaped(name: str) -> str:
    """Turn a layer name into a pattern that matches nothing else."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def checked_layers(layers: Any) -> tuple[tuple[str, Rows], ...]:
    """Return patterns and their overrides in order, checked.

    Raises:
        KanCompileError: no such form, an unknown key, or a value out of range.
    """
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
        check_keys(overrides, LayerRecipe, f"recipe layers {pattern!r}")
        if overrides.get("method") == "hawq-v2":
            raise KanCompileError(
                f"recipe layers {pattern!r}: method 'hawq-v2' divides bits between layers, so it holds for the whole model; "
                "set it outside layers, or give this layer weight_bits"
            )
        rules = {option.name: option.metadata for option in fields(LayerRecipe)}
        try:
            values = {key: checked_value(key, value, rules[key]) for key, value in overrides.items()}
        except KanCompileError as error:
            raise KanCompileError(f"{error} (in layers {pattern!r})") from error
        checked.append((pattern, tuple(sorted(values.items()))))
    return tuple(checked)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2


def _is_row(entry: Any) -> bool:
    return _is_pair(entry) and isinstance(entry[0], str)
