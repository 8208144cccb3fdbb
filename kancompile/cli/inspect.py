"""``kancompile inspect``: what a file contains, or what is found in a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_data, add_model, counts
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError
from kancompile.progress import say

TEXT = """\
examples:
  kancompile inspect build/model.onnx
  kancompile inspect --model models.py:make_kan --input-shape 784
  kancompile inspect --model models.py:make_recommender --data train.npz

The first form shows what a compiled file contains. The second shows which KAN layers are found in a model, and for
every other operation that was looked at why it stays as it is, with the line of code."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("file", nargs="?", metavar="MODEL.onnx", help="compiled file")
    add_model(parser, "--model", required=False)
    parser.add_argument("--input-shape", type=counts, metavar="N,N", help="one sample's shape, such as 784 or 3,32,32")
    add_data(
        parser, "data", "samples, which several inputs and integers need in place of --input-shape", required=False
    )
    parser.add_argument("--kernels", action="store_true", help="also ask ONNX Runtime which kernels it uses")


def run(options: argparse.Namespace) -> int:
    """Show a compiled file, or what is found in a model."""
    if (options.file is None) == (options.model is None):
        raise KanCompileError("inspect: expected either a MODEL.onnx file or --model, one of them")

    from kancompile.frontend import capture
    from kancompile.reporting import (
        describe_file,
        describe_manifest,
        describe_program,
        file_table,
        manifest_table,
        program_table,
        torn_pair,
    )
    from kancompile.targets import TARGETS
    from kancompile.validation import audit_kernels

    if options.file is not None and Path(options.file).suffix in {
        target.suffix for target in TARGETS.values() if target.suffix != ".onnx"
    }:
        described = describe_manifest(Path(options.file))
        show_result(options, described, manifest_table(described))
        return OK
    if options.file is not None:
        described = describe_file(options.file)
        text = file_table(described)
        if options.kernels:
            audit = audit_kernels(options.file)
            described["kernels"] = audit.to_dict()
            text += "\n" + audit.table()
        with working(options):
            if torn := torn_pair(Path(options.file)):
                say(f"note: {torn}")
        show_result(options, described, text)
        return OK
    with working(options):
        model = load_float_model(options)
        program = capture(model, _example(options, model))
    show_result(options, describe_program(program), program_table(program))
    return OK


def _example(options: argparse.Namespace, model: Any) -> Any:
    """Give what a model is captured with: samples, or the shape of one."""
    if options.data is not None:
        from kancompile.data import check_fits, load_calibration, model_inputs

        inputs = model_inputs(model)
        samples = load_calibration(
            opened_data(options), key=options.data_key, name="data", model=inputs, keep_integers=True
        )
        return check_fits(model, samples).samples
    if options.input_shape is None and not str(options.model).endswith(".pt2"):
        raise KanCompileError(
            "inspect: found no --input-shape, expected one sample's shape, such as 784 or 3,32,32, or --data FILE with samples, "
            "which several inputs and integers need"
        )
    return options.input_shape or _exported_shape(model)


def _exported_shape(model: Any) -> tuple[int, ...]:
    names = set(model.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape[1:] for node in model.graph.nodes if node.op == "placeholder" and node.name in names
    ]
    return tuple(int(size) for size in shapes[0])


COMMAND = Command("inspect", "show what a file contains or what is found in a model", TEXT, add_options, run)
