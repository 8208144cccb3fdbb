"""Describe a compiled file, or the KAN layers found in a model, as plain data and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from kancompile.compiler import MANIFEST_SUFFIX, manifest_path, why_torn
from kancompile.errors import KanCompileError, foreign, parse_json, read_text, reason
from kancompile.ir import Program, operator_name
from kancompile.reporting.facts.branch_meaning import meanings
from kancompile.runtimes import ModelFile, name_of, read_model

_PREFIX = "kancompile."
_WRITTEN_AS_JSON = ("layers", "recipe", "seed", "versions")


def describe_file(model: ModelFile) -> dict[str, Any]:
    """Describe an ONNX file from its own bytes alone.

    Returns:
        sizes, opset, inputs, outputs, initializers, operator counts, and the metadata that kancompile wrote (decoded).

    Raises:
        KanCompileError: the file cannot be read or is no ONNX model.
    """
    content = read_model(model)
    try:
        described = _described(onnx.load_model_from_string(content), len(content), model)
        json.dumps(described)  # names that are no UTF-8 are read as bytes, which is found out here
        return described
    except KanCompileError:
        raise
    except Exception as error:  # what can be decoded may still hold numbers and texts that are none
        raise KanCompileError(
            f"{name_of(model)}: found no ONNX model ({reason(error)}); give a complete .onnx file"
        ) from error


def _described(proto: onnx.ModelProto, size: int, model: ModelFile) -> dict[str, Any]:
    if not proto.graph.node:
        raise KanCompileError(f"{name_of(model)}: found an empty graph; give a complete .onnx file")
    operators: dict[str, int] = {}
    for node in proto.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    tensors = [
        {
            "name": tensor.name,
            "type": onnx.TensorProto.DataType.Name(tensor.data_type).lower(),
            "shape": list(tensor.dims),
            "bytes": len(tensor.raw_data) or tensor.ByteSize(),
        }
        for tensor in proto.graph.initializer
    ]
    metadata = {
        entry.key.removeprefix(_PREFIX): entry.value for entry in proto.metadata_props if entry.key.startswith(_PREFIX)
    }
    return {
        "model": name_of(model),
        "bytes": size,
        "ir_version": proto.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "inputs": {value.name: _type(value) for value in proto.graph.input},
        "outputs": {value.name: _type(value) for value in proto.graph.output},
        "operators": dict(sorted(operators.items())),
        "tensors": tensors,
        "metadata": {key: _decoded(value) if key in _WRITTEN_AS_JSON else value for key, value in metadata.items()},
    }


def file_table(described: dict[str, Any]) -> str:
    """Print the description of a file for people."""
    opset = ", ".join(f"{domain} {version}" for domain, version in described["opset"].items())
    lines = [
        f"{described['model']}, {described['bytes']:,} bytes, opset {opset}, IR {described['ir_version']}",
        *(f"input {name}: {kind}" for name, kind in described["inputs"].items()),
        *(f"output {name}: {kind}" for name, kind in described["outputs"].items()),
    ]
    metadata = dict(described["metadata"])
    if not metadata:
        lines.append("not written by kancompile: no metadata about layers")
    lines += _layer_lines(metadata.pop("layers", []), described["model"])
    for entry in described["tensors"]:
        shape = "x".join(map(str, entry["shape"])) or "scalar"
        lines.append(f"tensor {entry['name']}: {entry['type']} {shape}, {entry['bytes']:,} bytes")
    counted = ", ".join(f"{count} {name}" for name, count in described["operators"].items())
    lines.append(f"operators: {counted}")
    lines += [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in metadata.items()]
    return "\n".join(lines)


def describe_manifest(path: Path) -> dict[str, Any]:
    """Describe a compiled file of another format from the manifest beside it, which must be of these very bytes.

    Raises:
        KanCompileError: the file or its manifest is missing, or they do not belong together.
    """
    content = read_model(path)
    beside = [path.with_name(f"{stem}{MANIFEST_SUFFIX}") for stem in (path.name, path.stem)]
    torn = []
    for file in (file for file in beside if file.is_file()):
        manifest = read_manifest(file)
        why = why_torn(manifest, content)
        if why is None:
            return {"model": name_of(path), "bytes": len(content), "manifest": str(file), "metadata": manifest}
        torn.append(f"{file.name} beside it, which {why}")
    expected = " or ".join(file.name for file in beside)
    if torn:
        raise KanCompileError(
            f"{name_of(path)}: found {', and '.join(torn)}, expected its own {expected}; copy the two together, or compile again"
        )
    raise KanCompileError(
        f"{name_of(path)}: only ONNX files describe themselves; found no manifest beside it, expected {expected}"
    )


def torn_pair(path: Path) -> str | None:
    """Say that the manifest beside an ONNX file, which describes itself, is not its own; ``None`` where nothing is wrong."""
    beside = manifest_path(path)
    try:
        why = why_torn(read_manifest(beside), read_model(path)) if beside.is_file() else None
    except KanCompileError as error:
        return str(error)
    return None if why is None else f"{beside.name} beside it {why}; copy the two together, or compile again"


def manifest_table(described: dict[str, Any]) -> str:
    """Print what a manifest says about a file."""
    metadata = described["metadata"]
    lines = [f"{described['model']}, {described['bytes']:,} bytes, described by {described['manifest']}"]
    lines += _layer_lines(metadata.get("layers", []), described["model"])
    rest = {key: value for key, value in metadata.items() if key != "layers"}
    lines += [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()]
    return "\n".join(lines)


def read_manifest(path: Path) -> Any:
    """Read a manifest as plain data, whatever these are.

    Raises:
        KanCompileError: it cannot be read, or is no JSON.
    """
    who = f"manifest {str(path)!r}"
    text = read_text(path, who, "compile the model again")
    try:
        return parse_json(text)
    except Exception as error:
        raise KanCompileError(f"{who}: found no JSON ({reason(error)}); compile the model again") from error


def _layer_lines(layers: Any, who: str) -> list[str]:
    with foreign(f"{who}, its layers", "compile the model again"):
        return [f"layer {layer['name']}: {_layer_text(layer)}" for layer in layers]


def describe_program(program: Program) -> dict[str, Any]:
    """Describe the layers found in a captured model, and what stays as it is."""
    layers = [
        {
            "name": layer.name,
            "uses": layer.uses,
            "n_out": program.contraction(layer).n_out,
            "expansions": [
                {"n_in": e.n_in, "k": e.k, "branches": dict(e.branch_functions), "meanings": meanings(e)}
                for e in program.expansions(layer)
            ],
        }
        for layer in program.layers()
    ]
    rest = [vars(part) for part in program.unrecognized]
    return {"input_shape": list(program.input_shape), "layers": layers, "unrecognized": rest}


def program_table(program: Program) -> str:
    """Print the layers found in a captured model, and what stays as it is."""
    described = describe_program(program)
    lines = [f"{len(described['layers'])} KAN layers"]
    lines += [f"layer {layer['name']}: {_layer_text(layer)}" for layer in described["layers"]]
    stopped: dict[str, int] = {}
    for part in described["unrecognized"]:
        place = f", {part['source']}" if part["source"] else ""
        text = f"stays as it is: {operator_name(part['operator'])}{place}: {part['reason']}"
        stopped[text] = stopped.get(text, 0) + 1
    lines += [text + (f" ({count} times)" if count > 1 else "") for text, count in stopped.items()]
    return "\n".join(lines)


def _layer_text(layer: dict[str, Any]) -> str:
    parts = []
    for entry in layer["expansions"]:
        text = f"{entry['n_in']} inputs x {entry['k']} functions"
        if "inputs_read" in entry:
            text = f"{entry['inputs_read']} inputs looked up jointly, {entry['n_in']} functions"
        if "levels" in entry:
            text += f" ({entry['tables']} x {entry['levels']} rows, {entry['low']:.4g} ... {entry['high']:.4g})"
        elif any(entry.get("meanings", ())):
            text += f" ({', '.join(filter(None, entry['meanings']))})"
        parts.append(text)
    bits = f", {layer['weight_bits']}-bit weights, {layer['weight_bytes']:,} bytes" if "weight_bits" in layer else ""
    uses = f", used {layer['uses']} times" if layer.get("uses", 1) > 1 else ""
    return f"{' + '.join(parts)} -> {layer['n_out']}{bits}{uses}"


def _decoded(value: str) -> Any:
    try:
        return parse_json(value)
    except Exception:  # no JSON, or what is beyond it: then it is a text
        return value


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(shape)}]"
