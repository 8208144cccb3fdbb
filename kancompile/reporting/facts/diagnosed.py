"""Diagnose the recipe of a compiled model for its report."""

from __future__ import annotations

from typing import Any

from kancompile.diagnosis import examine, open_laboratory
from kancompile.reporting.facts.source import ReportSource, without_budgets


def diagnosis_of(source: ReportSource) -> dict[str, Any]:
    """Return :meth:`kancompile.diagnosis.Diagnosis.to_dict` of a compiled model, on the samples of its report.

    What is diagnosed is the recipe that the file was made by in the end: with allocated bits and with layers as the error gate
    left them.
    """
    laboratory = open_laboratory(
        source.reference,
        source.calibration,
        source.judging,
        without_budgets(source.recipe),
        source.seed,
        "cpu",
        source.captured,
    )
    return examine(laboratory, source.judged_on, source.judged_apart).to_dict()
