"""The JSON Schema of report data, which comes with the package."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def report_schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12)."""
    text = resources.files("kancompile.reporting").joinpath("report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
