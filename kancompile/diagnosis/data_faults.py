"""Causes that lie in the data: wrong preprocessing, inputs outside the grid, outlier features, unlike or too few samples.

Each is proven by doing it right: samples are scaled, clamped or joined, the model is lowered on those, and both programs are
judged on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kancompile.data import Calibration
from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.cause import GRID, OUTLIER, PREPROCESSING, SAMPLES, UNSEEN, Cause, Change, Effect
from kancompile.diagnosis.input_faults import (
    Outliers,
    Scaling,
    compare_distributions,
    find_outliers,
    usual_scalings,
)
from kancompile.diagnosis.laboratory import Laboratory, Outcome, transformed
from kancompile.ir import Expansion, Values, concatenated, first_of
from kancompile.recipe import SettledRecipe
from kancompile.validation import Score, outside_grid, points, read_from_input

_UNLIKE = 0.25  # standard deviations between distributions
_EXPLAINED = 0.4  # share of that which a scaling may leave to explain it
_POINTS = 5.0
_DEVIATIONS = 3.5
_MOSTLY = 0.25
_PILOT = 64
_ALL = 0.999
_NOTICED_DB = 1.5
_WORSE_POINTS = 1.0


@dataclass(frozen=True)
class DataSuspicions:
    """Looks for causes in the data of one laboratory.

    Attributes:
        laboratory: with the samples.
        recipe: that is used throughout.
        has_data: whether the judging samples come from elsewhere than the calibration samples.
    """

    laboratory: Laboratory
    recipe: SettledRecipe
    has_data: bool

    def causes(self, base: Outcome, anatomies: list[Anatomy]) -> Iterator[Cause]:
        """Yield what is found; ``base`` is the outcome of the recipe as it is."""
        wrong = self.preprocessing(base)
        if wrong is not None:
            yield wrong
            return  # nothing that is measured on wrong samples says anything about others
        outliers = list(self.outliers(base, anatomies))
        yield from outliers
        if not outliers:
            yield from self.unseen(base, anatomies)
            yield from self.few(base)

    def preprocessing(self, base: Outcome) -> Cause | None:
        """Find a scaling that was forgotten, or done once too often; of several inputs and of integers none is tried."""
        x = self.laboratory.x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        if self.has_data:
            found = self._unlike_data(base)
            if found is not None:
                return found
        found = self._unlike_labels(base)
        return found if found is not None else self._unlike_grid(base)

    def _unlike_data(self, base: Outcome) -> Cause | None:
        """Compare calibration samples with the data that judges."""
        lab = self.laboratory
        x, data = lab.x, lab.judging.samples
        mismatch = compare_distributions(x, data)
        if mismatch.distance < _UNLIKE or mismatch.scaled_distance > _EXPLAINED * mismatch.distance:
            return None
        if not self._takes(mismatch.scaling):
            return None
        own = lab.judge(lab.lowered(self.recipe), lab.fitting)
        after = self._lowered_on(mismatch.scaling(x), lab.judging)
        evidence = {
            "calibration_low": float(x.min()),
            "calibration_high": float(x.max()),
            "calibration_mean": float(x.mean()),
            "data_low": float(data.min()),
            "data_high": float(data.max()),
            "data_mean": float(data.mean()),
            "distance": mismatch.distance,
            "scaled_distance": mismatch.scaled_distance,
            "scaling": mismatch.scaling.text,
        }
        title = (
            f"calibration data span {float(x.min()):.4g} ... {float(x.max()):.4g}, the data {float(data.min()):.4g} ... "
            f"{float(data.max()):.4g}; scaled as {mismatch.scaling.text} they are alike"
        )
        change = Change(advice=f"preprocess the calibration data as the data: {mismatch.scaling.text}")
        effect = Effect(own.sqnr_db - base.sqnr_db, None, base, after)
        return Cause(PREPROCESSING, (), title, evidence, change, effect, True)

    def _unlike_labels(self, base: Outcome) -> Cause | None:
        """Look for a scaling with which the float model answers right significantly more often, on all labeled samples."""
        lab = self.laboratory
        sets = [lab.judging] if self.has_data or lab.fitting.targets is None else [lab.judging, lab.fitting]
        if lab.judging.targets is None:
            return None
        best: tuple[Score, Score, Scaling] | None = None
        for scaling in filter(self._takes, usual_scalings(lab.x)):
            compared = compare_scores(lab, sets, scaling)
            if compared is not None and (best is None or compared[1].value > best[1].value):
                best = (*compared, scaling)
        if best is None:
            return None
        return self._scaled(base, best[2], best[0], best[1])

    def _takes(self, scaling: Scaling) -> bool:
        """Whether the network answers for scaled samples; an embedding refuses tokens that it does not know."""
        lab = self.laboratory
        if not bool((lab.x == lab.x.round()).all(0).any()):
            return True
        try:
            lab.program(scaling(lab.x))
        except (IndexError, RuntimeError):
            return False
        return True

    def _scaled(
        self,
        base: Outcome,
        scaling: Scaling,
        now: Score | None,
        then: Score | None,
        fitting: Sequence[str] = (),
    ) -> Cause:
        lab = self.laboratory
        judging = transformed(lab.judging, scaling(lab.judging.samples))
        after = self._lowered_on(scaling(lab.x), judging)
        evidence: dict[str, object] = {
            "calibration_low": float(lab.x.min()),
            "calibration_high": float(lab.x.max()),
            "scaling": scaling.text,
        }
        outside = outside_grid(lab.program, lab.x)
        if outside is not None:
            evidence |= {"outside_grid": outside.share, "grid_low": outside.low, "grid_high": outside.high}
        title = f"samples span {float(lab.x.min()):.4g} ... {float(lab.x.max()):.4g}"
        points = None
        if now is not None and then is not None:
            evidence |= {"float_score": now.value, "scaled_float_score": then.value}
            title += f"; the float model itself has {now.text()} on them, and {then.text()} on {scaling.text}"
            points = then.points - now.points
        elif outside is not None:
            title += (
                f"; {100 * outside.share:.0f} % of them lie outside the grid {outside.low:.3g} ... {outside.high:.3g}"
            )
        advice = f"preprocess the samples as in training; {' or '.join(fitting or (scaling.text,))} fits"
        kind = PREPROCESSING if now is not None else GRID
        return Cause(
            kind, (), title, evidence, Change(advice=advice), Effect(None, points, base, after), True, now is None
        )

    def _unlike_grid(self, base: Outcome) -> Cause | None:
        """Compare inputs with the grid of the functions that read them; labels that are right rule this out."""
        lab = self.laboratory
        found = outside_grid(lab.program, lab.x)
        if lab.judging.targets is not None or found is None or found.share < _MOSTLY:
            return None
        low, high = found.low, found.high
        fitting = []
        for scaling in filter(self._takes, usual_scalings(lab.x)):
            scaled = scaling(lab.x)
            if float(((scaled >= low) & (scaled <= high)).double().mean()) >= _ALL:
                fitting.append((float(scaled.max() - scaled.min()), scaling))
        if not fitting:
            return None
        # of those that lie inside, the one that uses most of the grid
        best = max(fitting, key=lambda entry: entry[0])[1]
        return self._scaled(base, best, None, None, [scaling.text for _, scaling in fitting])

    def outliers(self, base: Outcome, anatomies: list[Anatomy]) -> Iterator[Cause]:
        """Find features that stretch the table of a layer for all others."""
        lab = self.laboratory
        for anatomy in anatomies:
            layer = lab.program.layer(anatomy.layer)
            for target in layer.expansions:
                expansion = lab.program.module(target)
                if not isinstance(expansion, Expansion):
                    continue
                read = lab.program.inputs(lab.x, [target])[target]
                found = find_outliers(_by_feature(read, expansion))
                if found is None:
                    continue
                cause = self._outlier(base, anatomy, expansion, found)
                if cause is not None:
                    yield cause
                break

    def _outlier(self, base: Outcome, anatomy: Anatomy, expansion: Expansion, found: Outliers) -> Cause | None:
        lab = self.laboratory
        alone = min(lab.outcome(lab.alone(self.recipe, anatomy.layer)).noise, base.noise)
        tried: list[tuple[Change, Effect]] = []
        chosen = self.recipe[anatomy.layer]
        if chosen.levels is not None and chosen.levels < anatomy.most_rows:
            rows = min(anatomy.most_rows, math.ceil(chosen.levels * found.stretch))
            change = Change({anatomy.layer: {"levels": rows}})
            kept = anatomy.scaled({"levels": (anatomy.rows / rows) ** 2})
            rest = max(base.noise - alone * (1 - kept), 1e-12 * base.noise)
            after = lab.outcome(change.applied(self.recipe))
            tried.append((change, Effect(10 * math.log10(base.noise / rest), None, base, after)))
        if chosen.range != "mse":
            change = Change({anatomy.layer: {"range": "mse"}})
            tried.append((change, Effect(None, None, base, lab.outcome(change.applied(self.recipe)))))
        clamped = self._clamped(anatomy.layer, expansion, found)
        if clamped is not None:
            tried.append(clamped)
        if not tried:
            return None
        change, effect = max(tried, key=lambda entry: entry[1].gain_db or -math.inf)
        names = ", ".join(map(str, found.features))
        title = (
            f"feature {names} of the inputs of {anatomy.layer!r} stretches its table {found.stretch:.3g} times: "
            f"{found.low:.4g} ... {found.high:.4g}, without it {found.others_low:.4g} ... {found.others_high:.4g}"
        )
        evidence = {
            "features": list(found.features),
            "stretch": found.stretch,
            "low": found.low,
            "high": found.high,
            "others_low": found.others_low,
            "others_high": found.others_high,
            "rows": anatomy.rows,
            "rows_for_others": anatomy.rows / found.stretch,
            "alternatives": [
                {"change": other.text(), "measured_db": result.gain_db}
                for other, result in tried
                if other is not change
            ],
        }
        return Cause(OUTLIER, (anatomy.layer,), title, evidence, change, effect)

    def _clamped(self, name: str, expansion: Expansion, found: Outliers) -> tuple[Change, Effect] | None:
        """Clamp the features to the range of the others, where they are features of the model's input."""
        lab = self.laboratory
        if not isinstance(lab.x, Tensor) or name not in [layer for layer, _, _ in read_from_input(lab.program, lab.x)]:
            return None

        def clamp(x: Tensor) -> Tensor:
            last = _by_feature_shape(x, expansion).clone()
            for feature in found.features:
                last[..., feature] = last[..., feature].clamp(found.others_low, found.others_high)
            return (last.movedim(-1, 1) if expansion.channels_first else last).reshape(x.shape)

        judging = transformed(lab.judging, clamp(lab.judging.samples))
        raw, kept = lab.float_score(lab.judging), lab.float_score(judging)
        if raw is not None and kept is not None and kept.points < raw.points - _WORSE_POINTS:
            return None  # the model needs these values
        before = lab.judge(lab.lowered(self.recipe), judging)
        after = self._lowered_on(clamp(lab.x), judging)
        names = ", ".join(map(str, found.features))
        advice = (
            f"clamp feature {names} to {found.others_low:.4g} ... {found.others_high:.4g}, or repair it "
            "(missing values, units), in the calibration data and at inference"
        )
        # a pilot predicts: few samples on both sides
        few = judging._take(np.arange(min(_PILOT, len(judging))))
        pilot = self._lowered_on(clamp(lab.x[:_PILOT]), few).sqnr_db
        predicted = pilot - lab.judge(lab.lowered(self.recipe), few).sqnr_db
        return Change(advice=advice), Effect(predicted, None, before, after)

    def unseen(self, base: Outcome, anatomies: list[Anatomy]) -> Iterator[Cause]:
        """Find layers whose inputs leave on the data what they were in calibration."""
        if not self.has_data or len(self.laboratory.judging) < 8:
            return
        beyond = [a for a in anatomies if a.outside_judged > 3 * a.outside_share + 0.005]
        if not beyond:
            return
        lab = self.laboratory
        worst = max(beyond, key=lambda anatomy: anatomy.outside_judged)
        effect = self._joined()
        own = lab.judge(lab.lowered(self.recipe), lab.fitting)
        title = (
            f"{100 * worst.outside_judged:.2f} % of the inputs of {worst.layer!r} on the data lie outside its table "
            f"({worst.low:.4g} ... {worst.high:.4g}), {100 * worst.outside_share:.2f} % in calibration"
        )
        evidence = {
            "outside_data": worst.outside_judged,
            "outside_calibration": worst.outside_share,
            "low": worst.low,
            "high": worst.high,
        }
        change = Change(advice="calibrate with samples like the data: add some of them to the calibration file")
        layers = tuple(anatomy.layer for anatomy in beyond)
        yield Cause(UNSEEN, layers, title, evidence, change, replace(effect, predicted_db=own.sqnr_db - base.sqnr_db))

    def few(self, base: Outcome) -> Iterator[Cause]:
        """Measure what half of the calibration samples would cost; where that is much, more would help."""
        lab = self.laboratory
        if len(lab.fitting) < 8:
            return
        half = lab.judge(lab.lower_on(self.recipe, lab.x[::2]))
        lost = base.sqnr_db - half.sqnr_db
        if not lost >= _NOTICED_DB:
            return
        n = len(lab.fitting)
        effect = self._joined() if self.has_data and len(lab.judging) >= 8 else Effect(None, None, half, base)
        measured = "with half of the data added" if effect.before is not half else f"from {n // 2} to {n} samples"
        title = f"with half of the {n} calibration samples the output loses {lost:.1f} dB, so more will help"
        evidence = {"samples": n, "half_sqnr_db": half.sqnr_db, "all_sqnr_db": base.sqnr_db, "measured": measured}
        change = Change(advice=f"calibrate with {2 * n} samples or more")
        yield Cause(SAMPLES, (), title, evidence, change, replace(effect, predicted_db=lost))

    def _joined(self) -> Effect:
        """Calibrate with half of the judging samples too, and judge on the other half."""
        lab = self.laboratory
        rows = np.arange(len(lab.judging))
        shown, kept = lab.judging._take(rows[::2]), lab.judging._take(rows[1::2])
        before = lab.judge(lab.lowered(self.recipe), kept)
        joined = concatenated([lab.x, shown.samples])
        return Effect(None, None, before, self._lowered_on(joined, kept))

    def _lowered_on(self, x: Values, judging: Calibration) -> Outcome:
        return self.laboratory.judge(self.laboratory.lower_on(self.recipe, x), judging)


def compare_scores(laboratory: Laboratory, sets: Sequence[Calibration], scaling: Scaling) -> tuple[Score, Score] | None:
    """Score the float program on samples as they are and scaled.

    Returns:
        the scores before and after, ``None`` where the second is not significantly better: by 5 points and,
        for classes, by 3.5 standard deviations of the samples whose answer changes (McNemar, 1947).
    """
    now = then = 0.0
    gained = lost = count = 0
    name = ""
    for samples in sets:
        assert samples.targets is not None
        other = transformed(samples, scaling(samples.samples))
        scores = laboratory.float_score(samples), laboratory.float_score(other)
        if scores[0] is None or scores[1] is None or not math.isfinite(scores[0].value + scores[1].value):
            return None
        name = scores[0].name
        now, then = now + scores[0].value * len(samples), then + scores[1].value * len(samples)
        count += len(samples)
        labels = samples.labels
        assert labels is not None
        if labels.is_floating_point() or labels[0].numel() != 1:
            continue
        before, after = (
            torch.cat([first_of(y) for y in laboratory.float_outputs(part)]).flatten(1).argmax(1) == labels.flatten()
            for part in (samples, other)
        )
        gained, lost = gained + int((after & ~before).sum()), lost + int((before & ~after).sum())
    if points(name, then - now) < _POINTS * count or gained - lost < _DEVIATIONS * math.sqrt(gained + lost):
        return None
    return Score(name, now / count), Score(name, then / count)


def _by_feature_shape(x: Tensor, expansion: Expansion) -> Tensor:
    """View model inputs as the expansion groups them, ``[n, *, n_in]``."""
    if expansion.channels_first:
        fits = x[0].numel() == math.prod(expansion.anchor_shape)  # else an image of any size
        return (x.reshape(len(x), *expansion.anchor_shape) if fits else x).movedim(1, -1)
    return x.reshape(len(x), *expansion.in_shape)


def _by_feature(x: Tensor, expansion: Expansion) -> Tensor:
    """View what an expansion reads as ``[n, n_in]``, leading dimensions and samples alike."""
    return _by_feature_shape(x, expansion).reshape(-1, expansion.n_in)
