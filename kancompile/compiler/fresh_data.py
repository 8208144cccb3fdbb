"""Estimate the error on fresh data where few samples calibrate: leave some out, lower with the others, measure on those left out.

Ranges and means of tables follow the calibration samples, so that the error on these very samples is too small, the more the
fewer they are (Stone, Cross-Validatory Choice and Assessment of Statistical Predictions, 1974).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kancompile.ir import Program, Values, joined
from kancompile.passes import method_named
from kancompile.progress import quiet, say
from kancompile.recipe import SettledRecipe
from kancompile.validation import ErrorMeasure, plain_number

FEW_SAMPLES = 64
"""Calibration samples below which the estimate is made; from there on ranges hold for fresh data of the same kind."""
_FOLDS = 4
_LEAST = 8
_NOTICEABLE_DB = 3.0
_QUICK = "awq+gptq"


@dataclass(frozen=True)
class FreshDataError:
    """What was found.

    Attributes:
        samples: that calibrate.
        seen_db: least ratio of any output on the calibration samples themselves.
        fresh_db: the same on samples that were left out; ``None`` where there are too few to leave any out.
    """

    samples: int
    seen_db: float
    fresh_db: float | None

    def note(self) -> str:
        """Say it for people."""
        few = f"fresh data: only {self.samples} calibration samples"
        if self.fresh_db is None:
            return f"{few}, too few to estimate the error on others; give {FEW_SAMPLES} or more"
        if self.fresh_db > self.seen_db - _NOTICEABLE_DB:
            return f"{few}; those left out in turn show about the same error as those that calibrate, {self.fresh_db:.1f} dB"
        return (
            f"{few}: on fresh data expect about {self.fresh_db:.1f} dB for the worst output (estimated by leaving samples out in "
            f"turn), not the {self.seen_db:.1f} dB of these same samples; give {FEW_SAMPLES} or more"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        fresh = None if self.fresh_db is None else plain_number(self.fresh_db)
        return {"samples": self.samples, "seen_db": plain_number(self.seen_db), "fresh_db": fresh}


def fresh_data_error(
    captured: Program,
    x: Values,
    recipe: SettledRecipe,
    lowering: Callable[[Values], Callable[[SettledRecipe], Program]],
    seed: int,
) -> FreshDataError | None:
    """Estimate it; ``None`` where there are enough samples.

    Args:
        captured: the float program.
        x: calibration samples ``[n, ...]``.
        recipe: the choices that were made.
        lowering: makes what lowers by a recipe, from calibration samples.
        seed: of the order in which samples are left out.
    """
    if len(x) >= FEW_SAMPLES:
        return None
    names = [layer.name for layer in captured.layers()]
    # methods that learn take minutes for every fold; what fresh data change lies in the ranges
    slow = [name for name in names if method_named(recipe[name].rounding_method).quick_columns == 0]
    recipe = recipe.with_overrides({name: {"method": _QUICK} for name in slow})
    say(f"fresh data: only {len(x)} calibration samples, leaving some out in turn ...")
    expected = captured(x)
    with quiet():
        seen = _worst(expected, lowering(x)(recipe)(x))
        if len(x) < _LEAST:
            return FreshDataError(len(x), seen, None)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        expected = joined(expected)
        found = torch.empty_like(expected)
        for fold in range(_FOLDS):
            out, kept = order[fold::_FOLDS], order[torch.arange(len(x)) % _FOLDS != fold]
            found[out] = joined(lowering(x[kept.sort().values])(recipe)(x[out]))
        return FreshDataError(len(x), seen, _worst(expected, found))


def _worst(expected: Values, found: Values) -> float:
    measure = ErrorMeasure()
    measure.add(expected, found, "model output")
    return measure.worst_db
