"""``kancompile recipe``: print a recipe and what its keys mean."""

from __future__ import annotations

import argparse

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_recipe, recipe_overrides
from kancompile.cli.session import show_result
from kancompile.recipe import read_recipe

TEXT = """\
examples:
  kancompile recipe > recipe.toml
  kancompile recipe --recipe recipe.toml --weight-bits 4 --json

Prints the recipe that the given file and options amount to, with the meaning of every key."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_recipe(parser)


def run(options: argparse.Namespace) -> int:
    """Print the recipe that a file and options amount to."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))
    show_result(options, recipe.to_dict(), recipe.to_toml(with_meanings=True).rstrip())
    return OK


COMMAND = Command("recipe", "print a recipe and what its keys mean", TEXT, add_options, run)
