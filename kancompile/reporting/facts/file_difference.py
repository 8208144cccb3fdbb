"""Compare two compiled files by what they say of themselves, and where that is the same, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kancompile.compiler import first_difference
from kancompile.errors import foreign
from kancompile.reporting.facts.inspection import describe_file, describe_manifest
from kancompile.runtimes import read_model

_OF_LAYER = {
    "inputs": "inputs",
    "functions": "functions",
    "outputs": "outputs",
    "rows": "table rows",
    "weight_bits": "weight bits",
    "weight_bytes": "weight bytes",
    "table_bytes": "table bytes",
    "uses": "uses",
}
_APART = ("layers", "recipe", "recipe_sha256")
"""What metadata say that stands elsewhere in a difference."""
_OF_MANIFESTS = (
    "model_sha256",
    "manifest_sha256",
    "made_from",
    "notes",
    "model_bytes",
    "deflated_bytes",
    "bit_allocation",
    "error_gate",
)
Pair = list[Any]


def describe_difference(first: str, second: str) -> dict[str, Any]:
    """Compare two files of one format.

    Args:
        first, second: ONNX files, which describe themselves, or files of other targets with their manifests beside them.

    Returns:
        ``equal`` (every byte), ``files``, ``bytes``, ``layers``, ``recipe``, ``operators`` and ``metadata`` with pairs of what
        differs, and ``first_difference``, where the bytes begin to differ.

    Raises:
        KanCompileError: a file cannot be read or says nothing about itself.
    """
    contents = [read_model(path) for path in (first, second)]
    described = [_described(path) for path in (first, second)]
    said = [entry["metadata"] for entry in described]
    with foreign(f"the layers of {first!r} or {second!r}", "compile the models again"):
        layers = _layers(*({layer["name"]: _facts(layer) for layer in entry.get("layers", [])} for entry in said))
        recipe = _changed(*(_flat(entry.get("recipe") or {}) for entry in said))
        # a key at its default is not written
        recipe = {key: ["default" if value is None else value for value in pair] for key, pair in recipe.items()}
    is_onnx = all(Path(path).suffix == ".onnx" for path in (first, second))
    same = contents[0] == contents[1]
    return {
        "equal": same,
        "files": [first, second],
        "bytes": [len(content) for content in contents],
        "interface": _changed(*({k: entry.get(k) for k in ("inputs", "outputs", "opset")} for entry in described)),
        "layers": layers,
        "recipe": recipe,
        "operators": _changed(*(entry.get("operators", {}) for entry in described)),
        "metadata": _changed(*(_rest(entry) for entry in said)),
        "first_difference": None if same else first_difference(contents[0], contents[1], is_onnx),
    }


def difference_table(difference: Mapping[str, Any]) -> str:
    """Print a difference for people."""
    first, second = difference["files"]
    before, after = difference["bytes"]
    if difference["equal"]:
        return f"equal: {first} and {second}, every one of {before:,} bytes"
    lines = [f"{first} -> {second}: {before:,} -> {after:,} bytes ({100 * (after - before) / before:+.1f} %)"]
    for layer in difference["layers"]:
        changes = [f"{_OF_LAYER[key]} {_pair(pair)}" for key, pair in layer["changed"].items()]
        lines.append(f"layer {layer['name']}: {', '.join(changes) or layer['only']}")
    lines += [
        f"{title}: {', '.join(f'{key} {_pair(pair)}' for key, pair in difference[title].items())}"
        for title in ("recipe", "interface", "operators", "metadata")
        if difference[title]
    ]
    lines.append(f"bytes differ from {difference['first_difference']}")
    return "\n".join(lines)


def _described(path: str) -> dict[str, Any]:
    return describe_file(path) if Path(path).suffix == ".onnx" else describe_manifest(Path(path))


def _facts(layer: Mapping[str, Any]) -> dict[str, Any]:
    expansions = layer["expansions"]
    rows = [entry.get("levels", entry.get("rows")) for entry in expansions]
    return {
        "inputs": sum(entry.get("inputs_read", entry["n_in"]) for entry in expansions),
        "functions": " + ".join(f"{entry['n_in']} x {entry['k']}" for entry in expansions),
        "outputs": layer["n_out"],
        "rows": rows[0] if len(rows) == 1 else rows,
        "weight_bits": layer["weight_bits"],
        "weight_bytes": layer["weight_bytes"],
        "table_bytes": sum(entry.get("table_bytes", 0) for entry in expansions),
        "uses": layer.get("uses", 1),
    }


def _layers(before: Mapping[str, dict[str, Any]], after: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys((*before, *after)):
        if name not in after or name not in before:
            only = f"only in the {'first' if name in before else 'second'} file"
            found.append({"name": name, "only": only, "changed": {}})
        elif changed := _changed(before[name], after[name]):
            found.append({"name": name, "only": "", "changed": changed})
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Pair]:
    keys = dict.fromkeys((*before, *after))
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Give the overrides of every pattern keys of their own."""
    flat = {key: value for key, value in recipe.items() if key != "layers"}
    for pattern, overrides in dict(recipe.get("layers") or {}).items():
        flat |= {f"{pattern}: {key}": value for key, value in dict(overrides).items()}
    return flat


def _rest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key not in (*_APART, *_OF_MANIFESTS)}


def _pair(pair: Pair) -> str:
    return " -> ".join(
        "none" if value is None else f"{value:,}" if type(value) is int else str(value) for value in pair
    )
