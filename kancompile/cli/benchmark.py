"""``kancompile benchmark``: time a file beside its float model and in other runtimes."""

from __future__ import annotations

import argparse
from typing import Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_data, add_model, count, counts, seed
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError

HONEST_FLOAT = "float by kancompile, ONNX Runtime"
TEXT = """\
examples:
  kancompile benchmark build/model.onnx --against models.py:make_kan --checkpoint kan.pt --batch-sizes 1,256
  kancompile benchmark build/model.onnx --against models.py:make_kan --checkpoint kan.pt --runtime all

Times the compiled file, the float export of the model in ONNX Runtime, and PyTorch in interleaved runs on this machine. Close
other programs first: times of a busy machine mean little. --runtime adds runtimes that are installed; each takes the
file of its own target beside MODEL.onnx (litert: model.tflite, c99: model.c, ort-mobile: model.ort)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    add_model(parser, "--against")
    parser.add_argument("--batch-sizes", type=counts, default=(1, 16, 256), metavar="N,N", help="default 1,16,256")
    parser.add_argument("--threads", type=counts, default=(1, 0), metavar="N,N", help="0 for all (default 1,0)")
    parser.add_argument(
        "--runtime",
        action="append",
        default=[],
        metavar="NAME",
        help="also time the model in NAME, such as openvino, tract, litert, c99, web, ort-mobile, or all; may be repeated",
    )
    parser.add_argument("--repeats", type=count, default=30, help="measured blocks of each candidate (default 30)")
    add_data(parser, "data", "inputs; seeded values in -1 ... 1 without them", required=False)
    parser.add_argument("--seed", type=seed, default=0, help="seed of the inputs (default 0)")


def run(options: argparse.Namespace) -> int:
    """Time a file beside its float model."""
    from kancompile.validation import benchmark, timed_runtimes

    runtimes = timed_runtimes(options.runtime)
    with working(options):
        model, data = load_float_model(options), None
        if options.data is not None:
            from kancompile.data import load_calibration, model_inputs

            data = load_calibration(
                opened_data(options),
                key=options.data_key,
                name="data",
                seed=options.seed,
                model=model_inputs(model),
                keep_integers=True,
            ).samples
        others: dict[str, bytes] = {}
        unavailable: dict[str, str] = {}
        try:
            others[HONEST_FLOAT] = _exact_file(options, model, data)
        except KanCompileError as error:
            unavailable[HONEST_FLOAT] = str(error)
        result = benchmark(
            options.file,
            model,
            options.batch_sizes,
            options.threads,
            repeats=options.repeats,
            data=data,
            seed=options.seed,
            others=others,
            unavailable=unavailable,
            runtimes=runtimes,
        )
    show_result(options, result.to_dict(), result.table())
    return OK


def _exact_file(options: argparse.Namespace, model: Any, data: Any) -> bytes:
    """Compile a model without rounding anything: what a good float implementation of it costs."""
    import torch

    from kancompile.compiler import compile as compile_model
    from kancompile.runtimes import RuntimeModel

    if data is None:
        shape = RuntimeModel(options.file).input_shape
        data = torch.rand(256, *shape, generator=torch.Generator().manual_seed(options.seed)) * 2 - 1
    return compile_model(model, data, recipe={"precision": "float"}, seed=options.seed).session_bytes


COMMAND = Command("benchmark", "time a compiled file beside its float model", TEXT, add_options, run)
