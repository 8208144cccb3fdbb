"""Say why a compiled model is worse than the float one: sweeps, ranked causes, and what to change."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kancompile.compiler import prepare_model
from kancompile.data import (
    LEAST_TO_SPLIT,
    ONE,
    Calibration,
    float32_by_default,
    load_calibration,
    model_inputs,
    opened,
    read_divided,
)
from kancompile.diagnosis.anatomy import Anatomy, dissect
from kancompile.diagnosis.cause import (
    BITS,
    FUNCTIONS,
    HAND_OVER,
    LEVELS,
    METHOD,
    PRECISION,
    RANGE,
    SATURATION,
    STANDS_OUT_DB,
    WORTH_TRYING_DB,
    Cause,
    Effect,
    ranked,
)
from kancompile.diagnosis.data_faults import DataSuspicions
from kancompile.diagnosis.laboratory import Laboratory, Outcome
from kancompile.diagnosis.result import Diagnosis
from kancompile.diagnosis.sensitivity import sensitivities_of
from kancompile.diagnosis.suspects import Suspect, jointly, suspects
from kancompile.errors import KanCompileError
from kancompile.ir import Program
from kancompile.progress import quiet, track
from kancompile.recipe import Recipe, SettledRecipe, read_recipe

_MOST_TRIED = 12
_MOST_JUDGING = 2048


@float32_by_default()
def diagnose(
    model: Any,
    calibration: Any,
    data: Any = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    exact: bool = False,
    trust: bool = False,
) -> Diagnosis:
    """Find out what a recipe costs where, and which change would bring how much.

    The lowered program computes what the compiled file computes, so that all is measured without writing one. The error gate
    of a compilation, which refines layers by itself below ``min_sqnr``, is not applied.

    Args:
        model: as for :func:`kancompile.compile`.
        calibration: samples to calibrate with, in every form that a compilation takes.
        data: samples to judge with, as the model will meet them, with labels if there are any; ``None`` holds out a part of
            the calibration samples.
        recipe: the choices to be judged.
        held_out: share held out where there is no ``data``.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        exact: whether slow rounding methods are used for wide layers as the recipe says, instead of ``uniform``; notes say
            where that differs.
        trust: as for :func:`kancompile.compile`.

    Raises:
        KanCompileError: bad input of any kind.
    """
    chosen = read_recipe(recipe)
    model = opened(model, trust)
    fitting, judging, judged_on = samples_for(calibration, data, chosen, held_out, seed, model=model)
    laboratory = open_laboratory(model, fitting, judging, chosen, seed, device, trust=trust)
    return examine(laboratory, judged_on, data is not None, exact)


def samples_for(
    calibration: Any,
    data: Any,
    recipe: Recipe,
    held_out: float,
    seed: int,
    key: str | None = None,
    data_key: str | None = None,
    model: Any = None,
) -> tuple[Calibration, Calibration, str]:
    """Read the samples to calibrate and to judge with, as ``model`` takes them, and say in words which the latter are.

    Raises:
        KanCompileError: unreadable samples, too few of them, or of different shapes.
    """
    inputs = model_inputs(model)
    if data is not None:
        samples = load_calibration(
            calibration, key=key, max_samples=recipe.calibration_samples, seed=seed, model=inputs, keep_integers=True
        )
        shape = samples.input_shape if ONE in samples.arrays else None
        judging = load_calibration(data, shape, key=data_key, seed=seed, name="data", model=inputs, keep_integers=True)
        return samples, judging, f"{len(judging)} samples of the data"
    if not 0 < held_out < 1:
        raise KanCompileError(f"held_out: found {held_out!r}, expected a share between 0 and 1, or data to judge with")
    divided = read_divided(calibration, recipe.calibration_samples, held_out, seed, key=key, model=inputs)
    if not divided.is_held_out:
        raise KanCompileError(
            f"calibration: found {len(divided.samples)} samples, expected at least {LEAST_TO_SPLIT} to hold some out, or data "
            "to judge with; give --data FILE (data=...)"
        )
    judging = divided.judging.subset(_MOST_JUDGING, torch.Generator().manual_seed(seed))
    return divided.fitting, judging, f"{len(judging):,} held-out calibration samples"


def open_laboratory(
    model: Any,
    fitting: Calibration,
    judging: Calibration,
    recipe: Recipe,
    seed: int,
    device: str,
    captured: Program | None = None,
    trust: bool = False,
) -> Laboratory:
    """Capture a model and prepare it for measurements.

    Raises:
        KanCompileError: the model does not take such samples, cannot be captured, or a pattern of the recipe fits no layer.
    """
    with quiet():
        prepared = prepare_model(model, fitting, recipe, seed, device, captured=captured, trust=trust)
    return Laboratory(prepared, judging.like(prepared.samples))


def examine(laboratory: Laboratory, judged_on: str, has_data: bool, exact: bool = False) -> Diagnosis:
    """Diagnose the recipe of a laboratory."""
    recipe, slow = (laboratory.recipe, []) if exact else laboratory.fast(laboratory.recipe)
    notes = [
        f"layer {name!r}: weights were rounded by 'uniform' here, not by the recipe's method, which takes long; "
        "--exact (exact=True) uses that"
        for name in slow
    ]
    base = laboratory.outcome(recipe)
    sensitivities, anatomies = [], []
    for name in track(laboratory.integer_layers(recipe), "measuring layers"):
        sensitivities += sensitivities_of(laboratory, recipe, name)
        anatomies.append(dissect(laboratory, recipe, name))
    notes += [
        f"layer {entry.layer!r}: {entry.dead_columns} of {entry.columns} weight columns are dead: their functions do not change "
        "on the calibration data, or their weights are 0"
        for entry in anatomies
        if entry.dead_columns > entry.columns // 2
    ]
    suspicions = DataSuspicions(laboratory, recipe, has_data)
    causes = list(suspicions.causes(base, anatomies))
    explained = {name for cause in causes for name in cause.layers if cause.stands_out}
    recipe_causes: list[Cause] = []
    if not any(cause.spoils_measurement for cause in causes):
        recipe_causes = _recipe_causes(laboratory, recipe, base, anatomies, explained, set(slow))
    return Diagnosis(
        base,
        laboratory.float_score(laboratory.judging),
        judged_on,
        tuple(sensitivities),
        tuple(anatomies),
        tuple(ranked([*causes, *recipe_causes])),
        len(recipe_causes),
        tuple(notes),
        laboratory.recipe.whole,
    )


def layer_suspects(
    laboratory: Laboratory, recipe: SettledRecipe, base: Outcome, anatomies: Sequence[Anatomy]
) -> list[Suspect]:
    """List the recipe changes worth trying in all layers, by predicted noise."""
    found = []
    for anatomy in anatomies:
        alone = laboratory.outcome(laboratory.alone(recipe, anatomy.layer))
        found += suspects(recipe[anatomy.layer], anatomy, base.noise, alone.noise, base.signal)
    return sorted(found, key=lambda suspect: suspect.predicted_noise)


def _recipe_causes(
    laboratory: Laboratory,
    recipe: SettledRecipe,
    base: Outcome,
    anatomies: Sequence[Anatomy],
    explained: set[str],
    fast: set[str],
) -> list[Cause]:
    if base.noise == 0:
        return []
    found = [
        suspect
        for suspect in layer_suspects(laboratory, recipe, base, anatomies)
        # a feature that stretches a table explains its rows and its range
        if not (suspect.layer in explained and suspect.kind in (RANGE, HAND_OVER, LEVELS))
        and not (suspect.layer in fast and suspect.kind == METHOD)
    ]
    wide = [suspect for suspect in found if suspect.kind == PRECISION]  # one measurement for all layers
    found = [suspect for suspect in found if suspect.kind != PRECISION]
    worth = [suspect for suspect in found if suspect.predicted_db(base.noise) >= WORTH_TRYING_DB][:_MOST_TRIED]
    causes = [_measured(laboratory, recipe, base, anatomies, s) for s in track(worth, "measuring changes")]
    best = _best_of_each(causes)
    alone = {cause.kind for cause in best if cause.stands_out}
    for joint in jointly(found + wide, base.noise) or wide:
        if joint.kind not in alone and joint.predicted_db(base.noise) >= WORTH_TRYING_DB:
            try:
                best.append(_measured(laboratory, recipe, base, anatomies, joint))
            except KanCompileError:
                if joint.kind != PRECISION:  # some functions have no form in 16 bits
                    raise
    return best


def _measured(
    laboratory: Laboratory, recipe: SettledRecipe, base: Outcome, anatomies: Sequence[Anatomy], suspect: Suspect
) -> Cause:
    after = laboratory.outcome(suspect.change.applied(recipe))
    layers = tuple(suspect.change.layers) or ((suspect.layer,) if suspect.layer else ())
    concerned = [anatomy for anatomy in anatomies if anatomy.layer in layers]
    evidence: dict[str, Any] = {}
    titles = []
    for anatomy in concerned:
        title, facts = _evidence(suspect.kind, anatomy, recipe)
        titles.append(title)
        evidence |= facts if len(concerned) == 1 else {anatomy.layer: facts}
    effect = Effect(suspect.predicted_db(base.noise), None, base, after)
    return Cause(suspect.kind, layers, "; ".join(titles), evidence, suspect.change, effect)


def _best_of_each(causes: Sequence[Cause]) -> list[Cause]:
    """Keep one change of each kind and layer: the first one tried among those within 1 dB of the best."""
    kept = []
    groups: dict[tuple[str, tuple[str, ...]], list[Cause]] = {}
    for cause in causes:
        groups.setdefault((cause.kind, cause.layers), []).append(cause)
    for group in groups.values():
        best = max(cause.effect.gain_db or 0.0 for cause in group)
        near = [cause for cause in group if (cause.effect.gain_db or 0.0) >= best - 1.0]
        assert near[0].effect.after is not None
        kept.append(min(near, key=lambda cause: cause.effect.after.constant_bytes if cause.effect.after else 0))
    return kept


def _evidence(kind: str, anatomy: Anatomy, recipe: SettledRecipe) -> tuple[str, dict[str, Any]]:
    chosen = recipe[anatomy.layer]
    who = f"layer {anatomy.layer!r}"
    facts: dict[str, Any]
    if kind in (RANGE, HAND_OVER):
        share = anatomy.share("outside")
        facts = {
            "outside_share": anatomy.outside_share,
            "low": anatomy.low,
            "high": anatomy.high,
            "input_low": anatomy.input_low,
            "input_high": anatomy.input_high,
            "error_share": share,
        }
        cut = "inputs" if kind == RANGE else "values handed over to it"
        return (
            f"{who}: {100 * anatomy.outside_share:.3g} % of the {cut} lie outside its table "
            f"({anatomy.low:.4g} ... {anatomy.high:.4g} of {anatomy.input_low:.4g} ... {anatomy.input_high:.4g}), "
            f"{100 * share:.0f} % of its error"
        ), facts
    if kind == LEVELS:
        share = anatomy.share("levels")
        step = (anatomy.high - anatomy.low) / max(anatomy.rows - 1, 1)
        facts = {"levels": anatomy.rows, "step": step, "error_share": share}
        return f"{who}: {anatomy.rows} table rows, {step:.3g} apart, {100 * share:.0f} % of its error", facts
    if kind == FUNCTIONS and anatomy.is_joint:
        lost = {"function_error": chosen.joint_error}
        return f"{who}: few joint functions of inputs in place of all, {chosen.joint_error:g} of the variance", lost
    if kind == FUNCTIONS:
        return (
            f"{who}: fewer functions of channels in place of all, {chosen.shared_error:g} of the variance",
            {"function_error": chosen.shared_error},
        )
    if kind == PRECISION:
        return f"{who}: 8-bit codes and weights", {"weight_bits": anatomy.weight_bits}
    share = anatomy.share("weights")
    facts = {"weight_bits": anatomy.weight_bits, "method": chosen.rounding_method, "error_share": share}
    if kind == SATURATION:
        fewer = anatomy.weight_bits < chosen.bits
        how = (
            f"weights rounded to {anatomy.weight_bits} of {chosen.weight_bits} bits"
            if fewer
            else "weights made smaller"
        )
        return (
            f"{who}: {how}, as sums of two products would not fit int16 on processors without VNNI; rounding is "
            f"{100 * share:.0f} % of its error"
        ), facts
    if kind == METHOD:
        return f"{who}: {anatomy.weight_bits}-bit weights rounded to nearest, {100 * share:.0f} % of its error", facts
    assert kind == BITS
    return (
        f"{who}: {anatomy.weight_bits}-bit weights by {chosen.rounding_method}, {100 * share:.0f} % of its error"
    ), facts


__all__ = ["STANDS_OUT_DB", "Diagnosis", "diagnose", "examine", "layer_suspects", "open_laboratory", "samples_for"]
