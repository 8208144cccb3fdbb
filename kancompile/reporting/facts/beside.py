"""Say where a file is worse than the float export, why, and which option mends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kancompile.ir import RECURRENCES
from kancompile.validation import BesideFloat

_WITH_WEIGHTS = frozenset(("embedding", *RECURRENCES))


def worse_than_float(manifest: Mapping[str, Any], beside: BesideFloat) -> list[str]:
    """List what is worse, a sentence each; empty where nothing is.

    Args:
        manifest: what was compiled.
        beside: what was measured.
    """
    found = []
    if beside.is_larger:
        assert beside.float_bytes is not None
        ratio = beside.compiled_bytes / beside.float_bytes
        much = f"{ratio:.1f} times as large as" if ratio >= 1.1 else f"{100 * (ratio - 1):.2g} % larger than"
        found.append(f"the file is {much} the float export: {_cause_of_bytes(manifest, beside)}")
    if beside.slower:
        times = " and ".join(f"{1 / time.ratio:.1f} times as long at batch {time.batch}" for time in beside.slower)
        found.append(f"compared with {beside.timed}, the file takes {times}: {_cause_of_time(manifest)}")
    return found


def _cause_of_bytes(manifest: Mapping[str, Any], beside: BesideFloat) -> str:
    layers = manifest["layers"]
    weights = {layer["name"]: layer["weight_bytes"] for layer in layers}
    tables = {layer["name"]: sum(entry.get("table_bytes", 0) for entry in layer["expansions"]) for layer in layers}
    wide = {
        layer["name"]: weights[layer["name"]] + tables[layer["name"]] for layer in layers if layer["weight_bits"] > 8
    }
    total = sum(weights.values()) + sum(tables.values())
    assert beside.float_bytes is not None
    # weights in float are in both files, and no part of what one is larger by
    kept = _WITH_WEIGHTS.intersection(part["operator"] for part in manifest["left_in_float"])
    of_layers = bool(kept) and total > beside.compiled_bytes - beside.float_bytes
    if 2 * total < beside.compiled_bytes and not of_layers:
        rest = beside.compiled_bytes - total
        return (
            f"graph and description take {rest:,} of its {beside.compiled_bytes:,} bytes, weights and tables {total:,}; a model "
            "this small gains nothing in bytes"
        )
    if 2 * sum(wide.values()) > total:
        name = max(wide, key=lambda layer: wide[layer])
        smaller = f"--layer '{name}' precision=int8 is smaller and less exact"
        return f"layer {name!r} holds {wide[name]:,} bytes in more than 8 bits; {smaller}"
    if sum(tables.values()) > sum(weights.values()):
        name = max(tables, key=lambda layer: tables[layer])
        rows = max(
            (
                entry.get("levels", 0)
                for layer in layers
                if layer["name"] == name
                for entry in layer["expansions"]
                if "inputs_read" not in entry
            ),
            default=0,
        )
        fewer = f"; --layer '{name}' levels={rows // 2} halves them and costs accuracy" if rows >= 8 else ""
        return f"tables of layer {name!r} hold {tables[name]:,} bytes{fewer}"
    name = max(weights, key=lambda layer: weights[layer])
    return f"weights of layer {name!r} hold {weights[name]:,} bytes; --weight-bits 4 halves them and costs accuracy"


def computes_in_float(layer: Mapping[str, Any]) -> bool:
    """Whether a layer of a manifest computes in float, whatever the bits of its weights."""
    return layer["weight_bits"] > 8 or layer.get("arithmetic") == "float"


def _cause_of_time(manifest: Mapping[str, Any]) -> str:
    layers = manifest["layers"]
    wide = [layer["name"] for layer in layers if computes_in_float(layer)]
    if wide:
        return f"layer {wide[0]!r} computes in float behind a table; --layer '{wide[0]}' precision=int8 is faster and less exact"
    if manifest["recipe"]["storage"] == "smallest" and any(layer["weight_bits"] < 8 for layer in layers):
        return "weights are unpacked from fewer than 8 bits; --storage fastest keeps them as int8"
    looked_up = {
        layer["name"]: sum(entry["n_in"] * entry["k"] for entry in layer["expansions"] if "table_bytes" in entry)
        for layer in layers
    }
    name = max(looked_up, key=lambda layer: looked_up[layer], default="")
    if not name or not looked_up[name]:
        return "its operators for exact functions are slower than those of the model; --precision int8 looks them up"
    return (
        f"{sum(looked_up.values()):,} functions are looked up for a sample, most of them in layer {name!r}, where the model "
        f"computes them faster; --layer '{name}' lowering=keep leaves that layer in float, --cpu x86-vnni helps "
        "processors that have it"
    )
