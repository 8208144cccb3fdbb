"""Compute a report as plain data, in the form that ``report.schema.json`` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kancompile.compiler import describe_interface
from kancompile.data import float32_by_default, parameter_bytes
from kancompile.ir import PassChange
from kancompile.reporting.facts.allocation_front import allocation_front
from kancompile.reporting.facts.beside import worse_than_float
from kancompile.reporting.facts.bit_front import measure_front, no_front
from kancompile.reporting.facts.contributions import measure_contributions
from kancompile.reporting.facts.diagnosed import diagnosis_of
from kancompile.reporting.facts.findings import findings
from kancompile.reporting.facts.goal import goal_missed
from kancompile.reporting.facts.inspection import describe_program
from kancompile.reporting.facts.layer_facts import layer_facts
from kancompile.reporting.facts.layer_kinds import count_layers, role_of
from kancompile.reporting.facts.source import ReportSource
from kancompile.validation import (
    BesideFloat,
    Edge,
    EdgeName,
    FloatExport,
    LayerPair,
    Observation,
    evaluate_edges,
    important_edges,
    measure_beside_float,
    observe,
    parse_edge,
    plain_number,
    worst_text,
)

SCHEMA_VERSION = 1
_EDGES = 12
_DIGITS = 5


@dataclass(frozen=True)
class ReportOptions:
    """What to measure beside the layers.

    Attributes:
        edges: edges to draw, ``LAYER:OUTPUT,INPUT``, beside the most important ones.
        edge_count: how many of those are drawn, divided between the layers.
        sweep: whether other bit widths are tried.
        float_export: whether the model is exported in float, for its size and time.
        latency: whether times are measured; they differ from run to run.
        diagnose: whether the recipe is diagnosed, which lowers the model some dozens of times.
    """

    edges: Sequence[str] = ()
    edge_count: int = _EDGES
    sweep: bool = True
    float_export: bool = True
    latency: bool = True
    diagnose: bool = False


@float32_by_default()
def collect(source: ReportSource, options: ReportOptions | None = None) -> dict[str, Any]:
    """Compute a report.

    Raises:
        KanCompileError: an edge that does not exist, or programs that do not fit together.
    """
    options = options or ReportOptions()
    pairs = [LayerPair(source.captured, source.program, n) for n in range(len(source.captured.layers()))]
    chosen = [parse_edge(text, pairs) for text in options.edges]  # before anything is measured
    seen = observe(source.captured, pairs, source.calibration.samples, source.seed)
    contributions = measure_contributions(source.captured, pairs, source.judging.samples)
    noise = sum(contribution.layer.noise for contribution in contributions.values())
    errors = {error.layer: error for error in source.validation.layers}
    manifest = source.manifest
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": source.name,
            "target": manifest["target"],
            "input_shape": list(source.program.input_shape),
            **describe_interface(source.program.interface),
            "seed": source.seed,
            "sha256": manifest.get("model_sha256"),
            "recipe": source.recipe.to_dict(),
            "recipe_sha256": manifest["recipe_sha256"],
            "calibration": dict(manifest["calibration"]),
            "versions": dict(manifest["versions"]) | {"kancompile": manifest["kancompile"]["version"]},
        },
        "measured_on": source.judged_on,
        "counted": count_layers({pair.name: pair.layer.uses for pair in pairs}, source.program.kinds),
        "summary": _summary(source, options),
        "findings": [],
        "layers": [
            {"role": role_of(pair.name, source.program.kinds, pair.layer.uses)}
            | layer_facts(pair, errors.get(pair.name), contributions.get(pair.name), noise, seen, source.audit)
            for pair in pairs
        ],
        "edges": [_edge_dict(edge) for edge in _edges(pairs, chosen, seen, options.edge_count)],
        "bit_front": measure_front(source) if options.sweep else no_front("off"),
        "allocation": allocation_front(manifest),
        "pipeline": [_captured(source), *(_change(change) for change in source.program.history)],
        "kernels": {
            "runtime": source.audit.runtime,
            "operators": dict(sorted(source.audit.operators.items())),
            "dequantized_constants": list(source.audit.dequantized_constants),
        },
        "unrecognized": list(manifest["unrecognized"]),
        "left_in_float": list(manifest["left_in_float"]),
        "notes": list(manifest["notes"]),
        "diagnosis": diagnosis_of(source) if options.diagnose else None,
    }
    report["findings"] = findings(report)
    return report


def _summary(source: ReportSource, options: ReportOptions) -> dict[str, Any]:
    validation, manifest = source.validation, source.manifest
    task = None
    if validation.drop is not None:
        name = next(iter(validation.metrics["float"]))
        task = {
            "name": name,
            "float": plain_number(validation.metrics["float"][name]),
            "compiled": plain_number(validation.metrics["compiled"][name]),
            "drop": plain_number(validation.drop),
            "paired": None if validation.paired is None else validation.paired.to_dict(),
            "text": "" if validation.paired is None else validation.paired.text(),
        }
    size = manifest.get("model_bytes", len(source.session_bytes))
    beside = BesideFloat(None, size, "", (), ("not compared with a float export",))
    if options.float_export:
        export = FloatExport(source.reference, source.judging.first(2))
        x = source.judging.samples
        beside = measure_beside_float(source.reference, export, source.session_bytes, size, x, options.latency)
    compared = beside.to_dict()
    layers = manifest["layers"]
    return {
        "samples": validation.n_samples,
        "passed": validation.passed,
        "reasons": list(validation.reasons),
        "goal_missed": goal_missed(manifest, validation),
        "task": task,
        "sqnr_db": plain_number(validation.compiled.sqnr_db),
        "max_abs": plain_number(validation.compiled.largest),
        "mean_abs": plain_number(validation.compiled.mean_abs),
        "top1_agreement": validation.compiled.agreement if validation.is_classifier else None,
        "worst": None if validation.compiled.worst is None else validation.compiled.worst.to_dict(),
        "worst_text": worst_text(validation.compiled),
        "outputs": validation.compiled.n_outputs,
        "tensors": [
            {"name": name, "sqnr_db": plain_number(part.sqnr_db), "worst_db": plain_number(part.worst_db)}
            for name, part in validation.compiled.parts.items()
        ],
        "notes": list(validation.notes),
        "runtime": {
            "differing": 0 if validation.runtime is None else validation.runtime.differing,
            "count": 0 if validation.runtime is None else validation.runtime.count,
            "sqnr_db": None if validation.runtime is None else plain_number(validation.runtime.sqnr_db),
        },
        "size": {
            "parameter_bytes": parameter_bytes(source.reference),
            "float_export_bytes": compared["float_export_bytes"],
            "compiled_bytes": size,
            "deflated_bytes": manifest.get("deflated_bytes"),
            "weight_bytes": sum(layer["weight_bytes"] for layer in layers),
            "table_bytes": sum(e.get("table_bytes", 0) for layer in layers for e in layer["expansions"]),
        },
        "latency": compared["latency"],
        "latency_of": beside.timed,
        "latency_note": "; ".join(beside.notes) or ("" if beside.times else "not measured"),
        "beside_float": worse_than_float(manifest, beside),
        "machine": compared["machine"],
    }


def _edges(pairs: Sequence[LayerPair], chosen: Sequence[EdgeName], seen: Observation, count: int) -> list[Edge]:
    """Draw the named edges first, then the most important ones, as many of every layer."""
    edges = []
    for pair in pairs:
        names = [name for name in chosen if name.layer == pair.name and name.expansion in seen.inputs]
        each = -(-count // len(pairs)) if count else 0
        names += [name for name in important_edges(pair, seen, each) if name not in names]
        edges.append(evaluate_edges(pair, names, seen))
    named = [edge for part in edges for edge in part if edge.name in chosen]
    # in turns, so that every layer is shown where there is not room for all
    longest = max(map(len, edges), default=0)
    turns = [part[i] for i in range(longest) for part in edges if i < len(part) and part[i].name not in chosen][:count]
    order = {pair.name: number for number, pair in enumerate(pairs)}
    return sorted([*named, *turns], key=lambda edge: order[edge.name.layer])


def _edge_dict(edge: Edge) -> dict[str, Any]:
    return {
        "layer": edge.name.layer,
        "output": edge.name.output,
        "input": edge.name.input,
        "tap": edge.name.tap,
        "importance": _round(edge.importance),
        "sqnr_db": plain_number(edge.sqnr_db),
        "rows_within_inputs": edge.rows,
        "x": _list(edge.x),
        "float": _list(edge.exact),
        "table": None if edge.table is None else _list(edge.table),
        "compiled": _list(edge.compiled),
        "histogram": {"bins": _list(edge.bins), "counts": [int(count) for count in edge.counts]},
    }


def _captured(source: ReportSource) -> dict[str, Any]:
    """Describe the first step, which has nothing before it."""
    found = describe_program(source.captured)["layers"]
    changes = []
    for layer in found:
        parts = [f"{e['n_in']} x {e['k']} functions" for e in layer["expansions"]]
        changes.append(
            {
                "node": layer["name"],
                "before": None,
                "after": f"{' + '.join(parts)} to {layer['n_out']} outputs",
            }
        )
    return {"name": "capture", "changes": changes, "notes": []}


def _change(change: PassChange) -> dict[str, Any]:
    return {
        "name": change.name,
        "changes": [{"node": node, "before": before, "after": after} for node, before, after in change.changes],
        "notes": list(change.notes),
    }


def _list(values: Tensor) -> list[float]:
    return [_round(value) for value in values.tolist()]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
