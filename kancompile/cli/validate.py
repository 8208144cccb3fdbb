"""``kancompile validate``: a file beside its float model, and in other runtimes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.options import add_classifier, add_data, add_model, add_thresholds, count
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError

if TYPE_CHECKING:
    from kancompile.validation import RuntimeComparison, Validation

_COMPARED_SAMPLES = 4096
TEXT = """\
example:
  kancompile validate build/model.onnx --against models.py:make_kan --checkpoint kan.pt --data test.npz --max-drop 0.5

Runs the float model in PyTorch and the file in ONNX Runtime on the same data. With labels 'y' in the .npz it also
compares accuracy (integer labels) or R2 (float targets).

  kancompile validate build/model.onnx --data test.npz --runtime all

With --runtime it runs the file, and those of other targets beside it, in every runtime named, and compares their outputs with
those of ONNX Runtime; --against may then be left out. Runtimes that are not installed are listed with what installs them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    add_model(parser, "--against", required=False)
    parser.add_argument(
        "--runtime",
        action="append",
        metavar="NAME",
        help="compare outputs of ONNX Runtime and of NAME, such as ort-mobile, ort-arm64 or all; may be repeated",
    )
    add_data(parser, "data", "test inputs")
    parser.add_argument("--min-agreement", type=float, metavar="PERCENT", help="least share of equal decisions")
    add_classifier(parser)
    parser.add_argument("--threads", type=count, default=1, help="threads of ONNX Runtime, 0 for all (default 1)")
    add_thresholds(parser)


def run(options: argparse.Namespace) -> int:
    """Compare a file with its float model, and with itself in other runtimes."""
    if options.model is None and not options.runtime:
        raise KanCompileError("validate: found neither --against nor --runtime, expected one of them or both")
    data: dict[str, Any] = {}
    texts: list[str] = []
    reasons: list[str] = []
    with working(options):
        if options.model is not None:
            result = _validated(options)
            data |= result.to_dict()
            texts.append(result.table())
            reasons += result.reasons
        if options.runtime:
            compared = _compared(options)
            data["runtimes"] = compared.to_dict()
            texts.append(compared.table())
            reasons += compared.reasons
    show_result(options, data, "\n".join(texts))
    if reasons:
        print(f"kancompile: threshold missed: {'; '.join(reasons)}", file=sys.stderr)
    return THRESHOLD_MISSED if reasons else OK


def _validated(options: argparse.Namespace) -> Validation:
    from kancompile.validation import validate

    return validate(
        options.file,
        load_float_model(options),
        opened_data(options),
        key=options.data_key,
        min_sqnr=options.min_sqnr,
        max_drop=options.max_drop,
        min_agreement=options.min_agreement,
        is_classifier=options.classifier,
        threads=options.threads,
    )


def _compared(options: argparse.Namespace) -> RuntimeComparison:
    from kancompile.data import load_calibration
    from kancompile.validation import compare_runtimes, runtimes_named

    runtimes = runtimes_named(options.runtime)
    samples = load_calibration(opened_data(options), key=options.data_key, name="data", max_samples=_COMPARED_SAMPLES)
    return compare_runtimes(Path(options.file), samples.inputs, runtimes)


COMMAND = Command("validate", "compare a compiled file with its float model", TEXT, add_options, run)
