"""Describe every layer and branch of a compiled model as plain data: sizes, errors, ranges, dead columns, proofs, kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kancompile.compiler import describe_layer
from kancompile.ir import AnyExpansion, IntegerContraction, layer_tables
from kancompile.recipe import WEIGHT_ONLY
from kancompile.reporting.facts.branch_meaning import branch_meaning
from kancompile.reporting.facts.contributions import Contribution, LayerContribution
from kancompile.reporting.facts.weight_errors import weight_errors
from kancompile.validation import KernelAudit, LayerError, LayerPair, Observation, Outside, dead_columns, plain_number

_SIGNIFICANT = 4
INT32_MAX = (1 << 31) - 1


def layer_facts(
    pair: LayerPair,
    error: LayerError | None,
    contribution: LayerContribution | None,
    total_noise: float,
    seen: Observation,
    audit: KernelAudit,
) -> dict[str, Any]:
    """Describe one layer.

    Args:
        pair: the float layer and the lowered one.
        error: of its output, errors of earlier layers included; ``None`` where it was not measured.
        contribution: what it does alone.
        total_noise: sum of the noise that all layers alone bring to the output.
        seen: what it received.
        audit: kernels of all layers.
    """
    described = describe_layer(pair.program, pair.layer)
    expansions = [
        _expansion_facts(pair, target, entry, seen)
        for target, entry in zip(pair.layer.expansions, described["expansions"], strict=True)
    ]
    errors = weight_errors(pair)
    return {
        "name": pair.name,
        "precision": precision_of(pair),
        "kind": "convolution" if pair.float_branches[0].weight.shape[4] > 1 or "kernel" in described else "linear",
        "n_out": described["n_out"],
        "columns": described["columns"],
        "weight_bits": described["weight_bits"],
        "weight_bytes": described["weight_bytes"],
        "table_bytes": sum(entry["table_bytes"] for entry in expansions),
        "scale_groups": described.get("scale_groups", 1),
        "hands_over": described["hands_over"],
        "sqnr_db": None if error is None else plain_number(error.sqnr_db),
        "worst": None if error is None or error.worst is None else error.worst.to_dict(),
        "max_abs": None if error is None else plain_number(error.max_abs),
        "alone": None if contribution is None else _contribution_facts(contribution.layer, total_noise),
        "kernels": kernels_of(pair.name, [other.name for other in pair.program.layers()], audit),
        "int16_pairs": described.get("int16_pairs"),
        "int32_sums": int32_sums(pair),
        "expansions": expansions,
        "branches": _branches(pair, described, contribution, total_noise, seen),
        "weight_errors": None
        if errors is None
        else {
            "relative": _rounded(errors.relative),
            "n_out": errors.n_out,
            "n_in": errors.n_in,
            "values": [[_rounded(value, 3) for value in row] for row in errors.values.tolist()],
        },
    }


def precision_of(pair: LayerPair) -> str:
    """Say in which arithmetic a layer computes: ``int8``, ``int16``, ``float`` or ``weight-only``."""
    bits = pair.contraction.weight_bits
    if bits == 8 and "arithmetic" in pair.contraction.describe():
        return WEIGHT_ONLY
    return {16: "int16", 32: "float"}.get(bits, "int8")


def kernels_of(name: str, layers: Sequence[str], audit: KernelAudit) -> list[dict[str, Any]]:
    """Find the audited kernels of a layer: nodes are named ``layer/operator``."""
    found = []
    for row in audit.rows:
        owners = [layer for layer in layers if row.node == layer or row.node.startswith(f"{layer}/")]
        if owners and max(owners, key=len) == name:
            found.append({"node": row.node, "operator": row.operator, "is_integer": row.is_integer})
    return found


def int32_sums(pair: LayerPair) -> dict[str, Any] | None:
    """Bound the integer sums of a layer from its codes: the largest that any input could make.

    Returns:
        ``largest`` and ``limit``; ``None`` where the layer does not compute in integers.
    """
    contraction = pair.contraction
    if not isinstance(contraction, IntegerContraction):
        return None
    weights = contraction.matrix.double().reshape(contraction.n_out, -1, contraction.taps)
    groups, zero_point = contraction.groups, contraction.zero_point
    bound = torch.zeros(weights.shape[0], dtype=torch.float64)
    start = 0
    for table in layer_tables(pair.program, pair.layer):
        codes = (table.table.to(torch.float64) - zero_point).abs()
        largest = table.per_input(codes.reshape(table.n_tables, table.rows, table.k).amax(1))
        size = table.n_in // groups * table.k
        part = weights[:, start : start + size].abs().sum(2).reshape(groups, -1, size)
        bound += (part * largest.reshape(groups, 1, size)).sum(2).flatten()
        start += size
    largest_sum = int((bound + contraction.bias.double().abs()).max())
    return {"largest": largest_sum, "limit": INT32_MAX}


def _expansion_facts(pair: LayerPair, target: str, entry: Mapping[str, Any], seen: Observation) -> dict[str, Any]:
    module = pair.program.node(target, AnyExpansion)
    form = {"PolynomialExpansion": "polynomial"}.get(entry["form"], "table" if module.yields_codes else "float")
    return {
        "name": target,
        "form": form,
        "n_in": module.n_in,
        "k": module.k,
        "inputs_read": entry.get("inputs_read"),
        "tables": entry.get("tables", 0),
        "table_bytes": entry.get("table_bytes", 0),
        "levels": entry.get("levels", entry.get("rows")),
        "low": _rounded(entry["low"]) if "low" in entry else None,
        "high": _rounded(entry["high"]) if "high" in entry else None,
        "reads": entry.get("reads"),
        "outside": outside_facts(seen.outside.get(target)),
    }


def functions_text(entry: Mapping[str, Any]) -> str:
    """Say how many functions of how many inputs an expansion has."""
    read = entry.get("inputs_read")
    return f"{entry['n_in']} x {entry['k']}" if read is None else f"{read} jointly: {entry['n_in']}"


def outside_facts(outside: Outside | None) -> dict[str, Any] | None:
    """Describe what a table's range cuts off."""
    if outside is None:
        return None
    worst = int(outside.of_input.argmax())
    return {
        "share": _rounded(outside.share),
        "below": outside.below,
        "above": outside.above,
        "count": outside.count,
        "smallest": _rounded(outside.smallest),
        "largest": _rounded(outside.largest),
        "worst_input": worst if outside.below + outside.above else None,
        "worst_share": _rounded(int(outside.of_input[worst]) / max(1, outside.seen_of_input)),
    }


def _branches(
    pair: LayerPair,
    described: Mapping[str, Any],
    contribution: LayerContribution | None,
    total_noise: float,
    seen: Observation,
) -> list[dict[str, Any]]:
    found = []
    columns = sum(branch.weight[..., 0].numel() // branch.weight.shape[1] for branch in pair.branches)
    for branch in pair.branches:
        own = branch.weight[..., 0].numel() // branch.weight.shape[1]
        alone = None if contribution is None else contribution.branches.get(branch.name)
        if alone is None and contribution is not None and len(pair.branches) == 1:
            alone = contribution.layer
        entry = next(
            e for e, t in zip(described["expansions"], pair.layer.expansions, strict=True) if t == branch.expansion
        )
        found.append(
            {
                "name": branch.name,
                "meaning": branch_meaning(pair, branch.name),
                "expansion": branch.expansion,
                "k": branch.columns.stop - branch.columns.start,
                "columns": own,
                "weight_bits": described["weight_bits"],
                "weight_bytes": round(described["weight_bytes"] * own / max(1, columns)),
                "levels": entry.get("levels", entry.get("rows")),
                "table_bytes": round(
                    entry.get("table_bytes", 0) * (branch.columns.stop - branch.columns.start) / entry["k"]
                ),
                "sqnr_db": None if alone is None else plain_number(alone.layer_sqnr_db),
                "alone": None if alone is None else _contribution_facts(alone, total_noise),
                "outside_share": _rounded(seen.outside[branch.expansion].share)
                if branch.expansion in seen.outside
                else None,
                "dead": asdict(dead_columns(branch, *seen.extremes.get(branch.expansion, (None, None)))),
            }
        )
    return found


def _contribution_facts(alone: Contribution, total_noise: float) -> dict[str, Any]:
    return {
        "sqnr_db": plain_number(alone.sqnr_db),
        "noise_share": _rounded(alone.noise / total_noise) if total_noise > 0 else 0.0,
        "argmax_changed": alone.argmax_changed,
    }


def _rounded(value: float, digits: int = _SIGNIFICANT) -> float:
    """Round to significant digits, as much as a reader or a plot needs."""
    return float(f"{value:.{digits}g}")
