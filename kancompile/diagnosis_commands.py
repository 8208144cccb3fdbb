"""What ``kancompile diagnose`` and ``kancompile tune`` do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.command_options import recipe_overrides
from kancompile.command_session import load_float_model, opened_data, show_result, working
from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.exit_codes import OK, THRESHOLD_MISSED
from kancompile.recipe import Recipe, read_recipe

# what loads PyTorch is imported where it is needed
if TYPE_CHECKING:
    from kancompile.data.calibration import Calibration


def _samples(options: argparse.Namespace, recipe: Recipe) -> tuple[Calibration, Calibration, str]:
    from kancompile.diagnosis.diagnosing import samples_for

    return samples_for(
        opened_data(options, "calibration"),
        None if options.data is None else opened_data(options),
        recipe,
        options.held_out,
        options.seed,
        options.calibration_key,
        options.data_key,
    )


def run_diagnose(options: argparse.Namespace) -> int:
    """Say what a recipe costs where, why, and what to change."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))

    from kancompile.diagnosis.diagnosing import examine, open_laboratory

    with working(options):
        fitting, judging, judged_on = _samples(options, recipe)
        laboratory = open_laboratory(load_float_model(options), fitting, judging, recipe, options.seed, options.device)
        result = examine(laboratory, judged_on, options.data is not None, options.exact)
    show_result(options, result.to_dict(), result.text())
    return OK


def run_tune(options: argparse.Namespace) -> int:
    """Change a recipe until targets are met, and write the model, its manifest and the recipe; or say what is missing."""
    overrides = recipe_overrides(options)
    # the targets of tuning: what the error gate of a compilation holds stays what the recipe file says
    min_sqnr, max_bytes = overrides.pop("min_sqnr", None), overrides.pop("max_bytes", None)
    recipe = read_recipe(options.recipe, **overrides)

    from kancompile.compiler.compile import compile as compile_model
    from kancompile.compiler.compiled_model import manifest_path
    from kancompile.diagnosis.tuning import CACHE_NAME, tune

    folder = Path(options.out)
    path, recipe_path = folder / "model.onnx", folder / "recipe.toml"
    check_destinations([path, manifest_path(path), recipe_path], options.force)
    with working(options):
        fitting, judging, judged_on = _samples(options, recipe)
        model = load_float_model(options)
        tuned = tune(
            model,
            fitting,
            judging,
            recipe=recipe,
            max_drop=options.max_drop,
            min_sqnr=min_sqnr,
            max_bytes=max_bytes,
            cache=folder / CACHE_NAME,
            seed=options.seed,
            device=options.device,
            judged_on=judged_on,
        )
        report: dict[str, Any] = {"path": None, "tuning": tuned.to_dict(), "validation": None}
        reasons = list(tuned.missed)
        text = tuned.text()
        if tuned.is_met:
            compiled = compile_model(model, fitting, recipe=tuned.recipe, seed=options.seed, device=options.device)
            result = compiled.validate(judging, min_sqnr=min_sqnr, max_drop=options.max_drop)
            reasons = list(result.reasons)
            budget = max_bytes if max_bytes is not None else recipe.max_bytes
            if budget is not None and len(compiled.model_bytes) > budget:
                reasons.append(f"the file takes {len(compiled.model_bytes)} bytes, allowed are {budget}")
            report["validation"] = result.to_dict() | {"data": judged_on}
            text += "\n" + result.table()
            if not reasons:
                contents = compiled.files(path) | {recipe_path: compiled.recipe.to_toml(with_meanings=True).encode()}
                write_atomically(contents, options.force)
                report["path"] = str(path)
                text += f"\nwrote {path} ({len(compiled.model_bytes):,} bytes) and {recipe_path}"
    show_result(options, report, text)
    if reasons:
        print(f"kancompile: threshold missed, nothing written: {'; '.join(reasons)}", file=sys.stderr)
    return THRESHOLD_MISSED if reasons else OK
