"""Write the model card of compiled files: Markdown behind a YAML header, as model hubs read it.

The header's keys are those of the Hugging Face Hub's specification of model cards. Nothing is invented: what no manifest and no
report says, such as the license or the model that was quantized, stands there only if it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kancompile.validation import number_of, title

_TAGS = ("kan", "kolmogorov-arnold-network", "quantization", "onnx")
_DEFAULT_TAG = {
    "ort-cpu": "onnxruntime",
    "ort-mobile": "onnxruntime",
    "c99": "microcontroller",
    "litert": "tflite",
    "qnn": "qnn",
}
_FRACTIONS = ("accuracy", "iou")  # measured in percent here, of 1 on hubs
_TO_FILL_IN = (
    "<!-- to be filled in by the author: what the model is for, what it was trained on, what it is not for -->"
)
_USE = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
feeds = {{entry.name: np.load(f"{{entry.name}}.npy") for entry in session.get_inputs()}}
outputs = session.run(None, feeds)
"""


@dataclass(frozen=True)
class CardFile:
    """A compiled file.

    Attributes:
        name: of the file.
        size: its bytes.
        manifest: what stands beside it.
    """

    name: str
    size: int
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What an author says of a model, each ``None`` where it is left open.

    Attributes:
        name: heading of the card.
        base_model: identifier of the float model, on a hub.
        license: identifier of a license.
        task: type of task, such as ``"tabular-classification"``.
        dataset: name of the data that the report was measured on.
    """

    name: str
    base_model: str | None = None
    license: str | None = None
    task: str | None = None
    dataset: str | None = None


def model_card(files: Sequence[CardFile], report: Mapping[str, Any] | None, facts: CardFacts) -> str:
    """Write a card.

    Args:
        files: at least one, all of the same model.
        report: of one of them, as ``kancompile report`` writes it.
        facts: what the author says.
    """
    parts = [_header(files, report, facts), f"# {facts.name}\n", _about(files, facts), _files(files), _inputs(files[0])]
    parts += [_results(report)] if report is not None else []
    parts += [_use(files), _made(files[0]), _limits(files[0])]
    return "\n".join(parts)


def _header(files: Sequence[CardFile], report: Mapping[str, Any] | None, facts: CardFacts) -> str:
    bits = sorted({layer["weight_bits"] for file in files for layer in file.manifest["layers"]})
    tags = [*_TAGS, *(f"{width}-bit" for width in bits), *(_DEFAULT_TAG[file.manifest["target"]] for file in files)]
    header: dict[str, Any] = {"library_name": "kancompile", "base_model_relation": "quantized"}
    header |= {} if facts.base_model is None else {"base_model": facts.base_model}
    header |= {} if facts.license is None else {"license": facts.license}
    header |= {} if facts.task is None else {"pipeline_tag": facts.task}
    header["tags"] = list(dict.fromkeys(tags))
    task = None if report is None else report["summary"]["task"]
    if task is not None:
        header["metrics"] = [task["name"]]
        if facts.task is not None and facts.dataset is not None:
            value = float(task["compiled"]) / (100 if task["name"] in _FRACTIONS else 1)
            header["model-index"] = [
                {
                    "name": facts.name,
                    "results": [
                        {
                            "task": {"type": facts.task},
                            "dataset": {"type": facts.dataset, "name": facts.dataset},
                            "metrics": [{"type": task["name"], "value": round(value, 6), "name": title(task["name"])}],
                        }
                    ],
                }
            ]
    return f"---\n{_yaml(header)}---\n"


def _yaml(value: Mapping[str, Any]) -> str:
    """Write plain data as YAML: a key a line, what is inside as JSON, which YAML is a superset of."""
    return "".join(f"{key}: {json.dumps(entry)}\n" for key, entry in value.items())


def _about(files: Sequence[CardFile], facts: CardFacts) -> str:
    layers = files[0].manifest["layers"]
    bits = sorted({layer["weight_bits"] for layer in layers})
    widths = f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"
    of = "A trained Kolmogorov-Arnold Network" if facts.base_model is None else facts.base_model
    version = files[0].manifest["kancompile"]["version"]
    return (
        f"{of}, quantized after training by kancompile {version}: {len(layers)} layers of lookup tables and integer weights of "
        f"{widths}.\n\n{_TO_FILL_IN}\n"
    )


def _files(files: Sequence[CardFile]) -> str:
    lines = ["## Files\n", "| file | target | bytes | SHA-256 |", "|---|---|---|---|"]
    lines += [
        f"| `{file.name}` | `{file.manifest['target']}` | {file.size:,} | `{file.manifest['model_sha256']}` |"
        for file in files
    ]
    return "\n".join(lines) + "\n"


def _inputs(file: CardFile) -> str:
    manifest = file.manifest
    lines = ["## Inputs and outputs\n"]
    if manifest.get("inputs"):
        lines += [
            f"* `{entry['name']}`: {entry['dtype']} {['batch', *entry['shape']]}".replace("'", "")
            for entry in manifest["inputs"]
        ]
        lines.append(f"* outputs: {', '.join(f'`{name}`' for name in manifest['outputs'])}")
    else:
        shape = ", ".join(map(str, ["batch", *manifest["input_shape"]]))
        lines.append(f"* `input`: float32 [{shape}]")
        lines.append("* `output`: float32")
    found = manifest.get("calibrated_range")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(end, int | float) for end in found):
        lines.append(
            f"\nTables were calibrated with inputs of {found[0]:.6g} ... {found[1]:.6g}; values beyond are read as the nearest."
        )
    return "\n".join(lines) + "\n"


def _results(report: Mapping[str, Any]) -> str:
    summary, task = report["summary"], report["summary"]["task"]
    lines = [f"## Results\n\nMeasured on {report['measured_on']}.\n", "| | float | quantized |", "|---|---|---|"]
    if task is not None:
        lines.append(
            f"| {title(task['name'])} | {number_of(task['name'], task['float'])} | {number_of(task['name'], task['compiled'])} |"
        )
        if task["paired"] is not None:
            low, high = task["paired"]["accuracy_interval"]
            lines.append(f"| 95 % interval | | {low:.2f} ... {high:.2f} % |")
    if isinstance(summary["sqnr_db"], int | float):
        lines.append(f"| signal to quantization noise (SQNR) | | {summary['sqnr_db']:.1f} dB |")
    if summary["worst"] is not None and isinstance(summary["worst"]["sqnr_db"], int | float):
        lines.append(f"| SQNR of the worst output | | {summary['worst']['sqnr_db']:.1f} dB |")
    if summary["top1_agreement"] is not None:
        lines.append(f"| top-1 agreement with the float model | | {summary['top1_agreement']:.2f} % |")
    size = summary["size"]
    before = "" if size["float_export_bytes"] is None else f"{size['float_export_bytes']:,}"
    lines.append(f"| bytes of `{report['model']['name']}` | {before} | {size['compiled_bytes']:,} |")
    return "\n".join(lines) + "\n"


def _use(files: Sequence[CardFile]) -> str:
    onnx = next((file for file in files if file.name.endswith(".onnx")), None)
    lines = ["## How to use\n"]
    if onnx is not None:
        lines += ["```python", _USE.format(file=onnx.name).rstrip(), "```"]
    else:
        lines.append(f"`{files[0].name}` is a file of the target `{files[0].manifest['target']}`.")
    return "\n".join(lines) + "\n"


def _made(file: CardFile) -> str:
    manifest = file.manifest
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None and value not in ([], {})}
    calibration = manifest["calibration"]
    lines = [
        "## How it was made\n",
        f"Calibrated with {calibration['samples']:,} samples (SHA-256 `{calibration['sha256']}`), seed {manifest['seed']}.\n",
        "```json",
        json.dumps(recipe, indent=1, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _limits(file: CardFile) -> str:
    lines = [
        "## Limits\n",
        "Inputs must be scaled as in training. A table reads an input outside its range as the nearest one inside.",
    ]
    kept = file.manifest.get("left_in_float") or []
    if kept:
        names = [str(entry.get("node", entry)) if isinstance(entry, Mapping) else str(entry) for entry in kept]
        lines.append(f"\nComputed in float: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}.")
    return "\n".join(lines) + "\n"
