"""Dynamic dimensions beside the batch, as users name them, against the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kancompile.data.calibration import Calibration
from kancompile.errors import KanCompileError

INPUT = "input"
"""Name of an only input."""
BATCH = "batch"


def read_dynamic(given: Any, samples: Calibration) -> dict[str, dict[int, str]]:
    """Read which dimensions are dynamic.

    Args:
        given: text, or several, for each input that has such a dimension: ``"x: batch, time, 8"``, a name for every dynamic size
            and a number or ``_`` for every fixed one; the name of the input may be left out where there is one. Or a mapping as
            ``torch.export`` takes it, ``{"x": {1: Dim("time")}}``, of one input ``{1: Dim("time")}``. Equal names are equal
            sizes.
        samples: of the model.

    Returns:
        names by input and number of the dimension, without the batch.

    Raises:
        KanCompileError: another input, number of dimensions or size than the samples have, or what is no name.
    """
    shapes = {name or INPUT: (len(samples), *array.shape[1:]) for name, array in samples.arrays.items()}
    found: dict[str, dict[int, str]] = {}
    for called, sizes in _entries(given, shapes):
        name = called if len(shapes) > 1 else next(iter(shapes))  # whatever the model calls its only input
        if name not in shapes:
            raise KanCompileError(f"dynamic: found input {name!r}, expected one of {list(shapes)!r}")
        shape = shapes[name]
        if isinstance(sizes, Mapping):
            named = {int(dim): str(getattr(size, "__name__", size)) for dim, size in sizes.items()}
        else:
            named = _named(name, [part.strip() for part in sizes.split(",")], shape)
        for dim, size in named.items():
            if not 0 <= dim < len(shape) or not size.isidentifier() or (size == BATCH) != (dim == 0):
                raise KanCompileError(
                    f"dynamic: found {size!r} for dimension {dim} of {name!r}, expected a name such as time, not {BATCH!r}, "
                    f"for one of the dimensions 1 ... {len(shape) - 1}"
                )
        found[name] = {dim: size for dim, size in named.items() if dim}
    _check_sizes(found, shapes)
    return {name: sizes for name, sizes in found.items() if sizes}


def _entries(given: Any, shapes: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(given, Mapping):
        entries = {next(iter(shapes)): given} if all(isinstance(key, int) for key in given) else given
        return list(entries.items())
    texts = [given] if isinstance(given, str) else list(given)
    found = []
    for text in texts:
        for part in text.split(";"):
            name, colon, sizes = part.rpartition(":")
            found.append((name.strip() if colon else next(iter(shapes)), sizes))
    return found


def _named(name: str, parts: list[str], shape: tuple[int, ...]) -> dict[int, str]:
    fits = len(parts) == len(shape) and all(
        part in ("_", str(size)) or part.isidentifier() for part, size in zip(parts, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join([BATCH, *map(str, shape[1:])])
        raise KanCompileError(
            f"dynamic: found {', '.join(parts)!r} for {name!r}, expected {len(shape)} sizes as the samples have ({wanted}), a "
            "name in place of every one that is dynamic"
        )
    return {dim: part for dim, part in enumerate(parts) if part != "_" and not part.isdigit()}


def _check_sizes(found: Mapping[str, Mapping[int, str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse one name for sizes that differ in the samples, and sizes that say nothing about others."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, dims in found.items():
        for dim, called in dims.items():
            size = shapes[name][dim]
            known, where = sizes.setdefault(called, (size, name))
            if known != size:
                raise KanCompileError(
                    f"dynamic: found {called!r} of size {known} in {where!r} and {size} in {name!r}, expected equal sizes; use "
                    "two names"
                )
            if size < 2:
                raise KanCompileError(
                    f"dynamic: found samples with {called!r} of size {size} in {name!r}, expected at least 2; calibrate with "
                    "longer ones"
                )
