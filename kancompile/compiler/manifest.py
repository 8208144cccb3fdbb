"""What is known about a compiled file, as plain data: for its manifest and for the metadata inside it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from kancompile.compiler.left_in_float import left_in_float
from kancompile.data import Calibration
from kancompile.ir import Interface, Layer, ModelWithExternalData, Program, file_bytes, smooth_codes
from kancompile.passes import prove_layer
from kancompile.recipe import Recipe
from kancompile.runtimes import CALIBRATED_RANGE
from kancompile.targets import METADATA, SHORT

_EXPANSION_FORM = {"n_in": int, "k": int, "table_bytes?": int}
_LAYER_FORM = {"name": str, "weight_bytes": int, "expansions": [_EXPANSION_FORM], "uses?": int}
_PART_FORM = {"node": str, "operator": str, "reason": str}
_REAL = (float, str, type(None))
_POINT_FORM = {
    "layers": dict,
    "bytes": int,
    "predicted_constant_bytes": (int, type(None)),
    "predicted_db": _REAL,
    "measured_db": _REAL,
    "predicted_us": (float, type(None)),
    "measured_us": (float, type(None)),
    "chosen": bool,
}
_FRONT_FORM = {"layers": dict, "constant_bytes": int, "us": (float, type(None)), "db": _REAL}
_SUMS = 200  # bytes of the nodes that add up the differences of a table
MANIFEST_FORM = {
    "kancompile": {"version": str},
    "target": str,
    "seed": int,
    "recipe_sha256": str,
    "cost_profile?": {"name": str, "sha256": str},
    "calibration": {"samples": int, "sha256": str, "notes": [str], "sampled?": bool},
    "versions": dict,
    "layers": [_LAYER_FORM],
    "unrecognized": [_PART_FORM | {"source": str}],
    "left_in_float": [_PART_FORM | {"count": str, "source?": str, "share?": float}],
    "notes": [str],
    "bit_allocation?": {"pareto_front?": [{"bits": dict, "sensitivity": float}]},
    "allocation?": {"points": [_POINT_FORM], "front": [_FRONT_FORM]},
    "kinds?": dict,
    "made_from?": dict,
    "model_bytes?": int,
    "external_sha256?": str,
    "deflated_bytes?": int,
}
"""What a reader of a manifest relies on; see :func:`kancompile.errors.foreign.check_form`."""
METADATA_FORM = {
    "version": str,
    "target": str,
    "seed": int,
    "recipe": dict,
    "recipe_sha256": str,
    "calibration_sha256": str,
    "versions": dict,
}
"""The same of the metadata inside a file."""

ABOUT_THE_FILE = ("model_sha256", "model_bytes", "deflated_bytes")


def describe_file_bytes(data: bytes) -> dict[str, Any]:
    """Give hash and size of a file, and its size in a compressed package; of one with external data the hashes of both."""
    if isinstance(data, ModelWithExternalData):
        first, second = (hashlib.sha256(part).hexdigest() for part in (data, data.external))
        return {"model_sha256": first, "model_bytes": file_bytes(data), "external_sha256": second}
    sizes = (hashlib.sha256(data).hexdigest(), len(data), len(zlib.compress(data, 9)))
    return dict(zip(ABOUT_THE_FILE, sizes, strict=True))


def describe(program: Program, samples: Calibration, recipe: Recipe, target: str, seed: int) -> dict[str, Any]:
    """Collect what the manifest says, in plain data; no paths and no times, so that equal runs give equal bytes."""
    return {
        "kancompile": {"version": _version("kancompile")},
        "target": target,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "recipe_sha256": recipe.sha256(),
        "cost_profile": {"name": recipe.costs.name, "sha256": recipe.costs.sha256()},
        "calibration": {"samples": len(samples), "sha256": samples.sha256(), "notes": list(samples.notes)}
        | ({"sampled": True} if samples.is_sampled else {}),
        "input_shape": list(program.input_shape),
        **({} if program.declared is None else describe_interface(program.declared)),
        "calibrated_range": _range_of(samples),
        "versions": {name: version for name, version in versions().items() if name != "kancompile"},
        "layers": [describe_layer(program, layer) for layer in program.layers()],
        "kinds": dict(program.kinds),
        "unrecognized": [
            {"node": part.node, "operator": part.operator, "reason": part.reason, "source": Path(part.source).name}
            for part in program.unrecognized
        ],
        "left_in_float": left_in_float(program, samples.first(2), recipe.costs.look_up),
        "notes": list(program.notes),
    }


def describe_interface(interface: Interface) -> dict[str, Any]:
    """Name inputs and outputs of a program."""
    inputs = [
        {
            "name": entry.name,
            "shape": [entry.dynamic.get(dim, size) for dim, size in enumerate(entry.shape, start=1)],
            "dtype": str(entry.dtype).removeprefix("torch."),
        }
        for entry in interface.inputs
    ]
    return {"inputs": inputs, "outputs": list(interface.outputs)}


def _range_of(samples: Calibration) -> Any:
    """Give the smallest and the largest value: of an only input of real numbers, or of every such one by name."""
    ranges = {
        name: [float(array.min()), float(array.max())]
        for name, array in samples.arrays.items()
        if array.dtype.kind == "f"
    }
    return ranges.get("", ranges)


def describe_layer(program: Program, layer: Layer) -> dict[str, Any]:
    """Describe one layer of a lowered program as plain data."""
    expansions = [expansion.describe() for expansion in program.expansions(layer)]
    described = {"name": layer.name, "expansions": expansions, **program.contraction(layer).describe()}
    if layer.uses > 1:
        described["uses"] = layer.uses
    proof = prove_layer(program, layer)
    if proof is not None:
        described["int16_pairs"] = {"exact": proof.holds} | asdict(proof)
    return described


def constant_bytes(program: Program, name: str | None = None) -> int:
    """Count the bytes of tables and weights as a file stores them: of one layer, or of all."""
    layers = program.layers() if name is None else [program.layer(name)]
    weights = sum(program.contraction(layer).stored_bytes() for layer in layers)
    return weights + sum(expansion.stored_bytes() for layer in layers for expansion in program.expansions(layer))


def smallest_bytes(program: Program) -> int:
    """Count the bytes of tables and weights as the smallest file stores them: tables by the differences of their rows."""
    tables = {id(table): table for layer in program.layers() for table in program.tables(layer).values()}
    saved = 0
    for table in tables.values():
        smooth = smooth_codes(table.table.numpy()) if table.bits == 8 else None
        saved += 0 if smooth is None else max(0, table.stored_bytes() - smooth.stored_bytes() - _SUMS)
    return constant_bytes(program) - saved


def metadata_of(facts: Mapping[str, Any], short: bool = False) -> dict[str, str]:
    """Flatten the facts to what formats store as metadata, text by name; ``short``: only what runtimes read."""
    if short:
        return {
            CALIBRATED_RANGE: json.dumps(_rounded(facts["calibrated_range"]), separators=(",", ":")),
            METADATA: SHORT,
        }
    flat = {
        "kancompile.version": facts["kancompile"]["version"],
        "kancompile.target": facts["target"],
        "kancompile.seed": str(facts["seed"]),
        "kancompile.recipe": json.dumps(facts["recipe"], sort_keys=True),
        "kancompile.recipe_sha256": facts["recipe_sha256"],
        "kancompile.calibration_sha256": facts["calibration"]["sha256"],
        CALIBRATED_RANGE: json.dumps(facts["calibrated_range"]),
        "kancompile.versions": json.dumps(facts["versions"], sort_keys=True),
        "kancompile.layers": json.dumps(facts["layers"], sort_keys=True),
    }
    return dict(sorted(flat.items()))


def _rounded(ranges: Any) -> Any:
    """Round ranges outwards to four digits, which is enough to tell that inputs are others than those of the calibration."""
    if isinstance(ranges, dict):
        return {name: _rounded(bounds) for name, bounds in ranges.items()}
    low, high = ranges
    step = 10.0 ** (math.floor(math.log10(max(abs(low), abs(high)) or 1.0)) - 3)
    return [float(f"{math.floor(low / step) * step:.4g}"), float(f"{math.ceil(high / step) * step:.4g}")]


def versions() -> dict[str, str]:
    """Give the versions of what a file's bytes depend on."""
    packages = ("kancompile", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return {name: _version(name) for name in packages} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return package_metadata.version(name)
    except package_metadata.PackageNotFoundError:
        return "unknown"
