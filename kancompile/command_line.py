"""The command ``kancompile``: reads arguments, calls :mod:`kancompile.commands`, turns errors into exit codes.

Nothing here imports PyTorch before a command really runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from kancompile.cpu_presets import CPU_PRESETS
from kancompile.errors import KanCompileError, ThresholdMissedError
from kancompile.recipe import (
    GRANULARITIES,
    LOWERINGS,
    METHODS,
    PRECISIONS,
    RANGES,
    STORAGES,
    describe_keys,
)

OK, THRESHOLD_MISSED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = (
    "exit codes: 0 done, 1 a threshold was missed, 2 wrong input or usage, 3 a bug in kancompile, 130 interrupted"
)

_MAIN = f"""\
Compile a trained Kolmogorov-Arnold Network (KAN) in PyTorch to a small quantized ONNX file that ONNX Runtime runs
with integer kernels, and prove that it still computes the same.

typical use:
  kancompile compile my_project.models:make_kan --checkpoint kan.safetensors --calibration train.npz --out build
  kancompile validate build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors --data test.npz
  kancompile benchmark build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors
  kancompile inspect build/model.onnx

{_EXIT_CODES}"""

_COMPILE = """\
examples:
  kancompile compile models.py:make_kan --checkpoint kan.pt --calibration train.npz --out build
  kancompile compile pkg.nets:KAN --factory-arg layers=[784,64,10] --checkpoint kan.safetensors \\
      --calibration train.npz --weight-bits 4 --method gptq --min-sqnr 25 --out build
  kancompile compile model.pt2 --calibration train.npz --recipe recipe.toml --layer layers.0 weight_bits=8 --out build

The calibration file is an .npz with an array 'x' [n, ...] of inputs scaled as in training (and, if you like, labels
'y'), or an .npy. A part of it is held out to measure the result. Writes OUT/model.onnx and OUT/model.manifest.json
(other targets: model.ort, model.c and model.h and so on, beside each other), all or none; where a threshold is missed
nothing is written."""

_VALIDATE = """\
example:
  kancompile validate build/model.onnx --against models.py:make_kan --checkpoint kan.pt --data test.npz --max-drop 0.5

Runs the float model in PyTorch and the file in ONNX Runtime on the same data. With labels 'y' in the .npz it also
compares accuracy (integer labels) or R2 (float targets).

  kancompile validate build/model.onnx --data test.npz --runtime all

With --runtime it runs the file, and those of other targets beside it, in every runtime named, and compares their outputs with
those of ONNX Runtime; --against may then be left out. Runtimes that are not installed are listed with what installs them."""

_BENCHMARK = """\
example:
  kancompile benchmark build/model.onnx --against models.py:make_kan --checkpoint kan.pt --batch-sizes 1,256

Times the compiled file, the float export of the model in ONNX Runtime, and PyTorch, in turns, on this machine. Close
other programs first: times of a busy machine mean little."""

_INSPECT = """\
examples:
  kancompile inspect build/model.onnx
  kancompile inspect --model models.py:make_kan --input-shape 784

The first form shows what a compiled file contains. The second shows which KAN layers are found in a model, and for
every other operation that was looked at why it stays as it is, with the line of code."""

_DIAGNOSE = """\
example:
  kancompile diagnose models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --weight-bits 4

Lowers single layers and branches, divides their errors into range, levels, codes and weights, looks at the data, and ranks
what could be wrong, each with a change of the recipe or of the data, its predicted and its measured effect. Labels 'y' in the
.npz help to find wrong preprocessing. Writes nothing."""

_TUNE = """\
example:
  kancompile tune models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --max-drop 0.3 \\
      --weight-bits 4 --out build

Starts from the given recipe and makes the cheapest useful change first until --max-drop, --min-sqnr and --max-bytes are met;
then writes OUT/model.onnx, its manifest and OUT/recipe.toml. Otherwise says what is missing, and writes nothing but
OUT/tune-cache.jsonl, with which an interrupted run goes on where it was."""

_RECIPE = """\
examples:
  kancompile recipe > recipe.toml
  kancompile recipe --recipe recipe.toml --weight-bits 4 --json

Prints the recipe that the given file and options amount to, with the meaning of every key."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _filter_warnings()
        from kancompile import commands, diagnosis_commands

        home = diagnosis_commands if options.command in ("diagnose", "tune") else commands
        code = int(getattr(home, f"run_{options.command}")(options))
        sys.stdout.flush()  # here a closed pipe can still be handled
        return code
    except ThresholdMissedError as error:
        print(f"kancompile: threshold missed, nothing written: {error}", file=sys.stderr)
        return THRESHOLD_MISSED
    except KanCompileError as error:
        print(f"kancompile: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("kancompile: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader, such as head, has what it wanted; stop Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:
        traceback.print_exc()
        print("kancompile: internal error; please report it with the text above", file=sys.stderr)
        return INTERNAL


def _filter_warnings() -> None:
    """Hide what libraries tell their developers; warnings meant for users stay."""
    import warnings

    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kancompile", description=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    compile_ = _add(commands, "compile", "compile a model to an ONNX file", _COMPILE)
    _add_model(compile_, "model", positional=True)
    compile_.add_argument("--calibration", required=True, metavar="FILE", help="inputs, .npz or .npy")
    compile_.add_argument(
        "--calibration-key", metavar="NAME", help="array in the .npz that holds the inputs (default x)"
    )
    compile_.add_argument(
        "--held-out",
        type=_fraction,
        default=0.2,
        metavar="SHARE",
        help="share of the calibration data kept to measure the result with (default 0.2; 0: use all for both)",
    )
    compile_.add_argument("--out", required=True, metavar="DIR", help="folder for the model and its manifest")
    compile_.add_argument("--force", action="store_true", help="replace existing files")
    compile_.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="what to compile for: ort-cpu (default), ort-mobile ..., or all; may be repeated, for several files in DIR",
    )
    compile_.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    compile_.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where rounding computes its matrices (default cpu)"
    )
    _add_recipe(compile_)
    _add_max_drop(compile_)

    validate = _add(commands, "validate", "compare a compiled file with its float model", _VALIDATE)
    validate.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    _add_model(validate, "--against", required=False)
    validate.add_argument(
        "--runtime",
        action="append",
        metavar="NAME",
        help="compare outputs of ONNX Runtime and of NAME, such as ort-mobile, ort-arm64 or all; may be repeated",
    )
    validate.add_argument("--data", required=True, metavar="FILE", help="test inputs, .npz (x, and labels y) or .npy")
    validate.add_argument("--data-key", metavar="NAME", help="array in the .npz that holds the inputs (default x)")
    validate.add_argument("--min-agreement", type=float, metavar="PERCENT", help="least share of equal argmax")
    validate.add_argument("--threads", type=_count, default=1, help="threads of ONNX Runtime, 0 for all (default 1)")
    _add_thresholds(validate)

    benchmark = _add(commands, "benchmark", "time a compiled file beside its float model", _BENCHMARK)
    benchmark.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    _add_model(benchmark, "--against")
    benchmark.add_argument("--batch-sizes", type=_counts, default=(1, 16, 256), metavar="N,N", help="default 1,16,256")
    benchmark.add_argument("--threads", type=_counts, default=(1, 0), metavar="N,N", help="0 for all (default 1,0)")
    benchmark.add_argument("--repeats", type=_count, default=30, help="measured blocks of each candidate (default 30)")
    benchmark.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")

    inspect = _add(commands, "inspect", "show what a file contains or what is found in a model", _INSPECT)
    inspect.add_argument("file", nargs="?", metavar="MODEL.onnx", help="compiled file")
    _add_model(inspect, "--model", required=False)
    inspect.add_argument(
        "--input-shape", type=_counts, metavar="N,N", help="one sample's shape, such as 784 or 3,32,32"
    )
    inspect.add_argument("--kernels", action="store_true", help="also ask ONNX Runtime which kernels it uses")

    _add_diagnosis(commands)

    recipe = _add(commands, "recipe", "print a recipe and what its keys mean", _RECIPE)
    _add_recipe(recipe)
    return parser


def _add_diagnosis(commands: Any) -> None:
    diagnose = _add(commands, "diagnose", "say why a recipe loses accuracy and what to change", _DIAGNOSE)
    tune = _add(commands, "tune", "change a recipe until targets are met", _TUNE)
    for parser in (diagnose, tune):
        _add_model(parser, "model", positional=True)
        parser.add_argument("--calibration", required=True, metavar="FILE", help="inputs, .npz or .npy")
        parser.add_argument("--calibration-key", metavar="NAME", help="array in the .npz with the inputs (default x)")
        parser.add_argument("--data", metavar="FILE", help="samples to judge with, labels if there are any")
        parser.add_argument("--data-key", metavar="NAME", help="array in the .npz with the inputs (default x)")
        parser.add_argument(
            "--held-out",
            type=_fraction,
            default=0.2,
            metavar="SHARE",
            help="share of the calibration data to judge with where --data is not given (default 0.2)",
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where rounding computes")
        _add_recipe(parser)
    diagnose.add_argument(
        "--exact", action="store_true", help="round wide layers by slow methods too, instead of by uniform"
    )
    _add_max_drop(tune)
    tune.add_argument("--out", required=True, metavar="DIR", help="folder for model, manifest, recipe.toml and cache")
    tune.add_argument("--force", action="store_true", help="replace existing files")


def _add(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{text}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print no progress, and no result but JSON and errors")
    return parser


def _add_model(parser: argparse.ArgumentParser, name: str, positional: bool = False, required: bool = True) -> None:
    text = "float model: PACKAGE.MODULE:FACTORY, path/to/file.py:FACTORY, or a .pt2 file"
    if positional:
        parser.add_argument(name, metavar="MODEL", help=text)
    else:
        parser.add_argument(name, dest="model", metavar="MODEL", required=required, help=text)
    parser.add_argument("--checkpoint", metavar="FILE", help="state dict: .safetensors, torch.save file or .npz")
    parser.add_argument(
        "--factory-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of FACTORY; may be repeated"
    )


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="least output SQNR in dB")
    _add_max_drop(parser)


def _add_max_drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-drop", type=float, metavar="POINTS", help="most points of accuracy (or R2) to lose")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe", "choices of the compilation; options win over the file")
    group.add_argument("--recipe", metavar="FILE", help=".toml or .json file of the keys below")
    choices = {
        "precision": PRECISIONS,
        "method": ("auto", *METHODS),
        "range": RANGES,
        "granularity": GRANULARITIES,
        "storage": STORAGES,
        "lowering": LOWERINGS,
        "cpu": tuple(CPU_PRESETS),
    }
    for key, default, allowed, meaning in describe_keys():
        option = f"--{key.replace('_', '-')}"
        shown = "" if default == "null" else f" (default {default.strip(chr(34))})"
        if key in choices:
            group.add_argument(option, choices=choices[key], help=f"{meaning}{shown}")
        else:
            group.add_argument(
                option, type=_number, metavar="N", help=f"{meaning}: {allowed}{shown}".replace("%", "%%")
            )
    group.add_argument(
        "--layer",
        action="append",
        nargs="+",
        default=[],
        metavar=("PATTERN", "KEY=VALUE"),
        help="override keys for layers, such as --layer 'layers.*' weight_bits=4; may be repeated, the last one wins",
    )


def recipe_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the recipe keys that were given as options.

    Raises:
        KanCompileError: an override without ``=``.
    """
    given = {key: getattr(options, key) for key, *_ in describe_keys() if getattr(options, key) is not None}
    layers = []
    for pattern, *items in options.layer:
        overrides: dict[str, Any] = {}
        for item in items:
            key, equals, text = item.partition("=")
            if not equals:
                raise KanCompileError(f"--layer {pattern!r}: found {item!r}, expected KEY=VALUE such as weight_bits=4")
            try:
                overrides[key.replace("-", "_")] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                overrides[key.replace("-", "_")] = text
        layers.append((pattern, overrides))
    return given | ({"layers": layers} if layers else {})


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no count, expected 0, 1, 2 ...")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, expected 0 up to, not including, 1")
    return value


def _version() -> str:
    from importlib import metadata

    try:
        return f"kancompile {metadata.version('kancompile')}"
    except metadata.PackageNotFoundError:
        return "kancompile (not installed as a package)"
