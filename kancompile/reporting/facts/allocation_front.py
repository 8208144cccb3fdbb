"""What an allocation chose among, as plain data for a report: measured points beside predictions, and the predicted front."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from kancompile.compiler import change_text


def allocation_front(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe the allocation of a manifest; ``None`` where nothing was allocated to budgets of bytes or time.

    A front is predicted for constants alone: what the files of the points take besides is added to all of it.
    """
    allocation = manifest.get("allocation")
    if not allocation or not allocation["points"]:
        return None
    points = allocation["points"]
    beside = [p["bytes"] - p["predicted_constant_bytes"] for p in points if p["predicted_constant_bytes"] is not None]
    rest = round(statistics.median(beside)) if beside else 0
    return {
        "points": [
            {
                key: point[key]
                for key in ("predicted_db", "measured_db", "bytes", "predicted_us", "measured_us", "chosen")
            }
            | {
                "text": _text(point["layers"]),
                "predicted_bytes": None
                if point["predicted_constant_bytes"] is None
                else point["predicted_constant_bytes"] + rest,
            }
            for point in points
        ],
        "front": [
            {"text": _text(one["layers"]), "bytes": one["constant_bytes"] + rest, "us": one["us"], "db": one["db"]}
            for one in allocation["front"]
        ],
    }


def _text(layers: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {change_text(change)}" for name, change in layers.items())
