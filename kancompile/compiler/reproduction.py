"""Compare a file with another compilation of the same model: what differs, and what may be the reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from kancompile.compiler.manifest import versions
from kancompile.errors import foreign, parse_json


def changed_versions(manifest: Mapping[str, Any]) -> list[str]:
    """Say which packages have other versions than those that a manifest names."""
    now = versions()
    then = {"kancompile": manifest["kancompile"]["version"], **manifest["versions"]}
    return [
        f"{name} {then.get(name, 'unknown')} then, {now.get(name, 'none')} now"
        for name in then
        if then.get(name) != now.get(name)
    ]


def changed_facts(manifest: Mapping[str, Any], again: Mapping[str, Any], without: tuple[str, ...]) -> list[str]:
    """Name what two manifests say otherwise, by keys joined with dots, but for some keys at the top."""
    one, other = (
        parse_json(json.dumps({key: of[key] for key in of if key not in without})) for of in (manifest, again)
    )
    return _changed(one, other, "")


def _changed(one: Any, other: Any, place: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [text for key in keys for text in _changed(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [text for number, pair in pairs for text in _changed(*pair, f"{place}.{number}")]
    return [] if one == other else [place]


def first_difference(then: bytes, now: bytes, is_onnx: bool) -> str | None:
    """Say where two files begin to differ: at which initializer, node or metadata of ONNX, else at which byte or line.

    Returns:
        a clause, ``None`` where they are equal.

    Raises:
        KanCompileError: the first one is no ONNX file.
    """
    if then == now:
        return None
    if is_onnx:
        with foreign("the file to compare with", "give the file that the manifest belongs to"):
            found = _in_onnx(onnx.load_model_from_string(then), onnx.load_model_from_string(now))
        if found is not None:
            return found
    place = next((at for at, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
    return f"byte {place:,} (line {then[:place].count(10) + 1:,}) of {len(then):,} then and {len(now):,} now"


def _in_onnx(then: onnx.ModelProto, now: onnx.ModelProto) -> str | None:
    before, after = ({one.name: one for one in model.graph.initializer} for model in (then, now))
    for name, tensor in before.items():
        if name not in after:
            return f"initializer {name!r}, which is missing now"
        if tensor.SerializeToString() != after[name].SerializeToString():
            return (
                f"initializer {name!r}: {_in_tensor(numpy_helper.to_array(tensor), numpy_helper.to_array(after[name]))}"
            )
    added = [name for name in after if name not in before]
    if added:
        return f"initializer {added[0]!r}, which was not there then"
    for number, (one, other) in enumerate(zip(then.graph.node, now.graph.node, strict=False)):
        if one.SerializeToString() != other.SerializeToString():
            return f"node {number}, {one.op_type} {one.name!r} then, {other.op_type} {other.name!r} now"
    if len(then.graph.node) != len(now.graph.node):
        return f"the number of nodes, {len(then.graph.node)} then, {len(now.graph.node)} now"
    said = [{entry.key: entry.value for entry in model.metadata_props} for model in (then, now)]
    changed = [key for key in {**said[0], **said[1]} if said[0].get(key) != said[1].get(key)]
    return f"metadata {', '.join(changed)}" if changed else None


def _in_tensor(then: np.ndarray[Any, Any], now: np.ndarray[Any, Any]) -> str:
    if then.shape != now.shape or then.dtype != now.dtype:
        return f"{then.dtype} {list(then.shape)} then, {now.dtype} {list(now.shape)} now"
    if then.dtype.kind not in "biuf":
        return f"{then.dtype} {list(then.shape)}, other values"
    differs = np.flatnonzero(then.reshape(-1).view(np.uint8) != now.reshape(-1).view(np.uint8)) // then.itemsize
    places = np.unique(differs)
    first = tuple(int(at) for at in np.unravel_index(places[0], then.shape)) if then.shape else ()
    values = f"{then.reshape(-1)[places[0]]!s} then, {now.reshape(-1)[places[0]]!s} now"
    return f"{len(places):,} of {then.size:,} values, the first at {list(first)}: {values}"
