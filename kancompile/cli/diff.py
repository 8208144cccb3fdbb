"""``kancompile diff``: what two compiled files have different."""

from __future__ import annotations

import argparse

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.session import show_result

TEXT = """\
examples:
  kancompile diff build/model.onnx other/model.onnx
  kancompile diff a/model.c b/model.c --json

Says how the sizes, the layers (bits, table rows, functions, bytes), the recipes, the operators and the metadata of two files
differ, and where their bytes begin to. ONNX files describe themselves; files of other targets need their manifests beside them.
Exits with 0 where every byte is equal and with 1 where one differs."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("first", metavar="A.onnx", help="compiled file")
    parser.add_argument("second", metavar="B.onnx", help="another one")


def run(options: argparse.Namespace) -> int:
    """Compare two files."""
    from kancompile.reporting import describe_difference, difference_table

    found = describe_difference(options.first, options.second)
    show_result(options, found, difference_table(found))
    return OK if found["equal"] else THRESHOLD_MISSED


COMMAND = Command("diff", "say how two compiled files differ", TEXT, add_options, run)
