"""The commands of ``kancompile`` in one parser."""

from __future__ import annotations

import argparse

from kancompile.cli import (
    benchmark,
    card,
    compare,
    compile,
    completion,
    diagnose,
    diff,
    inspect,
    library,
    profile,
    recipe,
    report,
    reproduce,
    train,
    tune,
    validate,
)
from kancompile.cli.command import Command
from kancompile.cli.usage import OneLineParser

EXIT_CODES = """\
exit codes:
  0    done
  1    a threshold was missed (compile then writes nothing), a file was not reproduced, or two files differ
  2    wrong input or usage; the message says what to change
  3    a bug in kancompile
  130  interrupted"""

MAIN = f"""\
Compile a trained Kolmogorov-Arnold Network (KAN) in PyTorch to a small quantized ONNX file that ONNX Runtime runs
with integer kernels, and prove that it still computes the same.

typical use:
  kancompile compile my_project.models:make_kan --checkpoint kan.safetensors --calibration train.npz --out build
  kancompile validate build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors --data test.npz
  kancompile benchmark build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors
  kancompile inspect build/model.onnx
  kancompile report build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors --data train.npz

{EXIT_CODES}"""

COMMANDS: tuple[Command, ...] = (
    compile.COMMAND,
    train.COMMAND,
    validate.COMMAND,
    benchmark.COMMAND,
    inspect.COMMAND,
    diff.COMMAND,
    diagnose.COMMAND,
    tune.COMMAND,
    compare.COMMAND,
    report.COMMAND,
    library.COMMAND,
    card.COMMAND,
    reproduce.COMMAND,
    profile.COMMAND,
    recipe.COMMAND,
    completion.COMMAND,
)


def command_parser() -> argparse.ArgumentParser:
    """Describe all commands and their options."""
    parser = OneLineParser("kancompile", description=MAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"{command.text}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument("--json", action="store_true", help="print the result as JSON")
        one.add_argument("--quiet", action="store_true", help="print no progress, and no result but JSON and errors")
        command.add_options(one)
        one.set_defaults(run=command.run, parser=parser)
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return f"kancompile {metadata.version('kancompile')}"
    except metadata.PackageNotFoundError:
        return "kancompile (not installed as a package)"
