"""Divide samples into those that calibrate and those that judge: the same way wherever it is done, so that results compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kancompile.data.calibration import LEAST_TO_SPLIT, Calibration, load_calibration
from kancompile.data.model_inputs import ModelInputs

MOST_HELD_OUT = 10_000
"""More samples to judge with would show a loss below 0.03 points, and take their time."""
_MOST_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class DividedSamples:
    """Samples and their two parts.

    Attributes:
        samples: all that were read.
        fitting: those to calibrate with.
        judging: those held out; all where none are.
        judged_on: which the latter are, in words.
        is_held_out: whether they are others than those that calibrate.
    """

    samples: Calibration
    fitting: Calibration
    judging: Calibration
    judged_on: str
    is_held_out: bool


def read_divided(
    source: Any,
    calibration_samples: int,
    share: float,
    seed: int,
    *,
    key: str | None = None,
    name: str = "calibration",
    model: ModelInputs | None = None,
) -> DividedSamples:
    """Read samples and hold some out.

    A share of the samples is held out, and what ``calibration_samples`` leaves over: of many samples more judge, up to
    :data:`MOST_HELD_OUT`.

    Args:
        source: as for :func:`kancompile.data.load_calibration`.
        calibration_samples: how many calibrate at most.
        share: to be held out at least; 0: all calibrate and judge.
        seed: of the choice.
        key: of the samples in the source.
        name: what errors call the data.
        model: names of the model's inputs.

    Raises:
        KanCompileError: see :func:`kancompile.data.load_calibration`.
    """
    most = calibration_samples + (max(MOST_HELD_OUT, int(calibration_samples * share)) if share else 0)
    samples = load_calibration(
        source, key=key, max_samples=max(2, most), seed=seed, name=name, model=model, keep_integers=True
    )
    if not share or len(samples) < LEAST_TO_SPLIT:
        return DividedSamples(samples, samples, samples, "the calibration data itself", False)
    size = sum(array[0].size for array in samples.arrays.values())
    left_over = min(len(samples) - calibration_samples, MOST_HELD_OUT, _MOST_ELEMENTS // max(1, size))
    count = max(round(len(samples) * share) if len(samples) * (1 - share) <= calibration_samples else 0, left_over)
    fitting, judging = samples.split(count, torch.Generator().manual_seed(seed))
    fitting = load_calibration(
        fitting, max_samples=max(2, calibration_samples), seed=seed, name=name, keep_integers=True
    )
    return DividedSamples(samples, fitting, judging, f"{len(judging):,} held-out calibration samples", True)
