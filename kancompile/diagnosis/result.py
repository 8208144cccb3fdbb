"""What a diagnosis found, as plain data and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.cause import STANDS_OUT_DB, TRIED, WORTH_TRYING_DB, Cause
from kancompile.diagnosis.laboratory import Outcome
from kancompile.diagnosis.sensitivity import Sensitivity
from kancompile.recipe import Recipe
from kancompile.validation import Printed, Score, aligned

_MOST_SHOWN = 8


@dataclass(frozen=True)
class Diagnosis(Printed):
    """What was found.

    Attributes:
        outcome: of the recipe as it is.
        float_score: accuracy, overlap or R2 of the float model, ``None`` without labels.
        judged_on: which samples judged, in words.
        sensitivities: of layers and branches.
        anatomies: of the integer layers.
        causes: ranked, the largest first.
        tried: changes that were predicted to bring something and measured.
        notes: what else a reader should know, such as rounding that was done faster than the recipe says.
        recipe: the recipe that was diagnosed.
    """

    outcome: Outcome
    float_score: Score | None
    judged_on: str
    sensitivities: tuple[Sensitivity, ...]
    anatomies: tuple[Anatomy, ...]
    causes: tuple[Cause, ...]
    tried: int
    notes: tuple[str, ...]
    recipe: Recipe

    def __repr__(self) -> str:
        return self.text()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing stands out."""
        return not any(cause.stands_out for cause in self.causes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "judged_on": self.judged_on,
            "outcome": self.outcome.to_dict(),
            "float_score": None if self.float_score is None else self.float_score.value,
            "healthy": self.is_healthy,
            "sensitivities": [entry.to_dict() for entry in self.sensitivities],
            "layers": [entry.to_dict() for entry in self.anatomies],
            "causes": [cause.to_dict() for cause in self.causes],
            "changes_measured": self.tried,
            "notes": list(self.notes),
            "recipe": self.recipe.to_dict(),
        }

    def text(self) -> str:
        """Print for people."""
        return _text(self)


def _text(diagnosis: Diagnosis) -> str:
    """Write what was measured, what each layer costs, and the ranked causes with their changes."""
    outcome = diagnosis.outcome
    head = f"measured on {diagnosis.judged_on}: SQNR {outcome.sqnr_db:.2f} dB, worst output {outcome.worst_db:.2f} dB"
    if diagnosis.float_score is not None and outcome.score is not None:
        head += f", {outcome.score_text} (float {diagnosis.float_score.text()})"
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
        lines.append("why, the largest first:")
        for number, cause in enumerate(standing[:_MOST_SHOWN], 1):
            lines += _cause_lines(number, cause)
    else:
        tried = (
            f"none of the {diagnosis.tried} recipe changes that were measured brings {STANDS_OUT_DB:g} dB within 8-bit integers"
            if diagnosis.tried
            else f"no recipe change was predicted to bring {WORTH_TRYING_DB:g} dB"
        )
        lines.append(f"nothing stands out: no fault of the data was found, and {tried}")
        lines.append(f"  others of {', '.join(TRIED)} were predicted to bring less than {WORTH_TRYING_DB:g} dB")
    if others:
        lines.append("measured as well:")
        lines += [f"  {cause.kind}, {cause.change.text()}: {_effect(cause)}" for cause in others[:_MOST_SHOWN]]
    return "\n".join(lines)


def _cause_lines(number: int, cause: Cause) -> list[str]:
    return [
        f"{number}. {cause.kind}: {cause.title}",
        f"   change{' (free: no more bytes, no more time)' if cause.change.is_free else ''}: {cause.change.text()}",
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
