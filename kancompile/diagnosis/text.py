"""Print diagnoses for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kancompile.diagnosis.causes import STANDS_OUT_DB, Cause
from kancompile.validation.text_table import aligned

if TYPE_CHECKING:
    from kancompile.diagnosis.diagnosing import Diagnosis

_MOST_SHOWN = 8


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Write what was measured, what each layer costs, and the ranked causes with their changes."""
    outcome = diagnosis.outcome
    head = f"measured on {diagnosis.judged_on}: output SQNR {outcome.sqnr_db:.2f} dB"
    if diagnosis.float_score is not None and outcome.score is not None:
        head += f", score {outcome.score:.2f} % (float {diagnosis.float_score:.2f} %)"
    lines = [head]
    if diagnosis.sensitivities:
        rows = [["quantized", "only this: SQNR dB", "drop", "all but this: SQNR dB", "drop"]]
        for entry in diagnosis.sensitivities:
            name = entry.layer if entry.branch is None else f"  branch {entry.branch}"
            cells = [name, f"{entry.only.sqnr_db:.2f}", _points(entry.only.drop)]
            without = entry.without
            cells += ["", ""] if without is None else [f"{without.sqnr_db:.2f}", _points(without.drop)]
            rows.append(cells)
        lines += aligned(rows)
    lines += [f"note: {note}" for note in diagnosis.notes]
    standing = [cause for cause in diagnosis.causes if cause.stands_out]
    others = [cause for cause in diagnosis.causes if not cause.stands_out]
    if standing:
        lines.append("why, the weightiest first:")
        for number, cause in enumerate(standing[:_MOST_SHOWN], 1):
            lines += _cause_lines(number, cause)
    else:
        tried = (
            f"none of {diagnosis.tried} recipe changes that were measured" if diagnosis.tried else "no recipe change"
        )
        lines.append(
            f"nothing stands out: no fault of the data was found, and {tried} within 8-bit integers brings "
            f"{STANDS_OUT_DB:g} dB; precision=int16 has more"
        )
    if others:
        lines.append("measured as well:")
        lines += [f"  {cause.kind}, {cause.change.text()}: {_effect(cause)}" for cause in others[:_MOST_SHOWN]]
    return "\n".join(lines)


def _cause_lines(number: int, cause: Cause) -> list[str]:
    return [
        f"{number}. {cause.kind}: {cause.title}",
        f"   change: {cause.change.text()}",
        f"   effect: {_effect(cause)}",
    ]


def _effect(cause: Cause) -> str:
    effect = cause.effect
    predicted = []
    if effect.predicted_db is not None:
        predicted.append(f"{effect.predicted_db:+.1f} dB")
    if effect.predicted_points is not None:
        predicted.append(f"{effect.predicted_points:+.1f} points")
    measured = []
    if effect.before is not None and effect.after is not None:
        measured.append(f"{effect.gain_db:+.1f} dB ({effect.before.sqnr_db:.1f} -> {effect.after.sqnr_db:.1f})")
    if effect.gain_points is not None:
        measured.append(f"{effect.gain_points:+.2f} points")
    return f"predicted {', '.join(predicted) or 'nothing'}, measured {', '.join(measured) or 'nothing'}"


def _points(drop: float | None) -> str:
    return "" if drop is None else f"{drop:.2f}"
