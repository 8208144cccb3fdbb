"""``kancompile tune``: change a recipe until targets are met."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kancompile.cli.command import Command
from kancompile.cli.diagnose import judged_samples
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.options import add_diagnosis, add_max_drop, recipe_overrides
from kancompile.cli.session import load_float_model, show_result, working
from kancompile.recipe import read_recipe

TEXT = """\
example:
  kancompile tune models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --max-drop 0.3 \\
      --weight-bits 4 --out build

Starts from the given recipe and makes the cheapest useful change first until --max-drop, --min-sqnr and --max-bytes are met;
then writes OUT/model.onnx, its manifest and OUT/recipe.toml. Otherwise says what is missing, and writes nothing but
OUT/tune-cache.jsonl, with which an interrupted run goes on where it was."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_diagnosis(parser)
    add_max_drop(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for model, manifest, recipe.toml and cache")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(options: argparse.Namespace) -> int:
    """Change a recipe until targets are met, and write the model, its manifest and the recipe; or say what is missing."""
    overrides = recipe_overrides(options)
    # the targets of tuning: what the error gate of a compilation holds stays what the recipe file says
    min_sqnr, max_bytes = overrides.pop("min_sqnr", None), overrides.pop("max_bytes", None)
    recipe = read_recipe(options.recipe, **overrides)

    from kancompile.compiler import check_destinations, manifest_path, write_atomically
    from kancompile.compiler import compile as compile_model
    from kancompile.diagnosis import CACHE_NAME, tune

    folder = Path(options.out)
    path, recipe_path = folder / "model.onnx", folder / "recipe.toml"
    check_destinations([path, manifest_path(path), recipe_path], options.force)
    with working(options):
        model = load_float_model(options)
        fitting, judging, judged_on = judged_samples(options, recipe, model)
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


COMMAND = Command("tune", "change a recipe until targets are met", TEXT, add_options, run)
