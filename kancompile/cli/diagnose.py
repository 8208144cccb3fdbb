"""``kancompile diagnose``: why a recipe loses accuracy, and what to change."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_diagnosis, recipe_overrides
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from kancompile.data import Calibration

TEXT = """\
example:
  kancompile diagnose models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --weight-bits 4

Lowers single layers and branches, divides their errors into range, levels, codes and weights, looks at the data, and ranks
what could be wrong, each with a change of the recipe or of the data, its predicted and its measured effect. Labels 'y' in the
.npz help to find wrong preprocessing. Writes nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_diagnosis(parser)
    parser.add_argument(
        "--exact", action="store_true", help="round wide layers by slow methods too, instead of by uniform"
    )


def judged_samples(options: argparse.Namespace, recipe: Recipe, model: Any) -> tuple[Calibration, Calibration, str]:
    """Read the samples to calibrate and to judge with, and say in words which the latter are."""
    from kancompile.diagnosis import samples_for

    return samples_for(
        opened_data(options, "calibration"),
        None if options.data is None else opened_data(options),
        recipe,
        options.held_out,
        options.seed,
        options.calibration_key,
        options.data_key,
        model,
    )


def run(options: argparse.Namespace) -> int:
    """Say what a recipe costs where, why, and what to change."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))

    from kancompile.diagnosis import examine, open_laboratory

    with working(options):
        model = load_float_model(options)
        fitting, judging, judged_on = judged_samples(options, recipe, model)
        laboratory = open_laboratory(model, fitting, judging, recipe, options.seed, options.device)
        result = examine(laboratory, judged_on, options.data is not None, options.exact)
    show_result(options, result.to_dict(), result.text())
    return OK


COMMAND = Command("diagnose", "say why a recipe loses accuracy and what to change", TEXT, add_options, run)
