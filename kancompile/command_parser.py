"""The commands of ``kancompile`` and their options."""

from __future__ import annotations

import argparse
from typing import Any

from kancompile.command_help import (
    BENCHMARK,
    COMPILE,
    COMPLETION,
    DIAGNOSE,
    EXIT_CODES,
    INSPECT,
    MAIN,
    RECIPE,
    REPORT,
    TUNE,
    VALIDATE,
)
from kancompile.command_options import (
    add_data,
    add_diagnose,
    add_diagnosis,
    add_held_out,
    add_max_drop,
    add_model,
    add_recipe,
    add_report,
    add_thresholds,
    count,
    counts,
    seed,
)
from kancompile.shell_completion import SHELLS


def command_parser() -> argparse.ArgumentParser:
    """Describe all commands and their options."""
    parser = argparse.ArgumentParser(
        "kancompile", description=MAIN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    compile_ = _add(commands, "compile", "compile a model to an ONNX file", COMPILE)
    add_model(compile_, "model", positional=True)
    add_data(compile_, "calibration", "inputs scaled as in training")
    add_held_out(compile_)
    compile_.add_argument("--out", required=True, metavar="DIR", help="folder for the model and its manifest")
    compile_.add_argument("--force", action="store_true", help="replace existing files")
    compile_.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="what to compile for: ort-cpu (default), ort-mobile ..., or all; may be repeated, for several files in DIR",
    )
    compile_.add_argument(
        "--report",
        action="store_true",
        help="also write a report, OUT/model.report.html and .json (model.missed.report.* where a threshold is missed)",
    )
    add_diagnose(compile_)
    compile_.add_argument("--seed", type=seed, default=0, help="seed of every random choice (default 0)")
    compile_.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where rounding computes its matrices (default cpu)"
    )
    add_recipe(compile_)
    add_max_drop(compile_)

    validate = _add(commands, "validate", "compare a compiled file with its float model", VALIDATE)
    validate.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    add_model(validate, "--against", required=False)
    validate.add_argument(
        "--runtime",
        action="append",
        metavar="NAME",
        help="compare outputs of ONNX Runtime and of NAME, such as ort-mobile, ort-arm64 or all; may be repeated",
    )
    add_data(validate, "data", "test inputs")
    validate.add_argument("--min-agreement", type=float, metavar="PERCENT", help="least share of equal argmax")
    validate.add_argument("--threads", type=count, default=1, help="threads of ONNX Runtime, 0 for all (default 1)")
    add_thresholds(validate)

    benchmark = _add(commands, "benchmark", "time a compiled file beside its float model", BENCHMARK)
    benchmark.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    add_model(benchmark, "--against")
    benchmark.add_argument("--batch-sizes", type=counts, default=(1, 16, 256), metavar="N,N", help="default 1,16,256")
    benchmark.add_argument("--threads", type=counts, default=(1, 0), metavar="N,N", help="0 for all (default 1,0)")
    benchmark.add_argument(
        "--runtime",
        action="append",
        default=[],
        metavar="NAME",
        help="also time the model in NAME, such as openvino, tract, litert, c99, web, ort-mobile, or all; may be repeated",
    )
    benchmark.add_argument("--repeats", type=count, default=30, help="measured blocks of each candidate (default 30)")
    add_data(benchmark, "data", "inputs; seeded values in -1 ... 1 without them", required=False)
    benchmark.add_argument("--seed", type=seed, default=0, help="seed of the inputs (default 0)")

    inspect = _add(commands, "inspect", "show what a file contains or what is found in a model", INSPECT)
    inspect.add_argument("file", nargs="?", metavar="MODEL.onnx", help="compiled file")
    add_model(inspect, "--model", required=False)
    inspect.add_argument("--input-shape", type=counts, metavar="N,N", help="one sample's shape, such as 784 or 3,32,32")
    inspect.add_argument("--kernels", action="store_true", help="also ask ONNX Runtime which kernels it uses")

    diagnose = _add(commands, "diagnose", "say why a recipe loses accuracy and what to change", DIAGNOSE)
    add_diagnosis(diagnose)
    diagnose.add_argument(
        "--exact", action="store_true", help="round wide layers by slow methods too, instead of by uniform"
    )

    tune = _add(commands, "tune", "change a recipe until targets are met", TUNE)
    add_diagnosis(tune)
    add_max_drop(tune)
    tune.add_argument("--out", required=True, metavar="DIR", help="folder for model, manifest, recipe.toml and cache")
    tune.add_argument("--force", action="store_true", help="replace existing files")

    report = _add(commands, "report", "explain a compiled file on one HTML page", REPORT)
    add_report(report)

    recipe = _add(commands, "recipe", "print a recipe and what its keys mean", RECIPE)
    add_recipe(recipe)

    completion = _add(commands, "completion", "print a script that completes commands in a shell", COMPLETION)
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    return parser


def _add(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{text}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print no progress, and no result but JSON and errors")
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return f"kancompile {metadata.version('kancompile')}"
    except metadata.PackageNotFoundError:
        return "kancompile (not installed as a package)"
