"""``kancompile train``: compile, train on at the bits of the recipe, and write the files that ``compile`` writes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.options import (
    add_data,
    add_device,
    add_max_drop,
    add_model,
    add_recipe,
    count,
    counts,
    fraction,
    recipe_overrides,
    seed,
)
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError
from kancompile.progress import say
from kancompile.recipe import read_recipe

if TYPE_CHECKING:
    from kancompile.compiler import CompiledModel
    from kancompile.data import Calibration
    from kancompile.validation import Validation

TEXT = """\
examples:
  kancompile train models.py:make_kan --checkpoint kan.pt --data train.npz --weight-bits 2 --levels 16 --out build
  kancompile train models.py:make_kan --checkpoint kan.pt --data train.npz --weight-bits 2 --levels 4 --index lsq+ \\
      --epochs 5 --seed 1 --out build --resume
  kancompile train models.py:make_kan --checkpoint kan.pt --data train.npz --levels 16 --widths 8,4,3,2 --out build

Quantization-aware training for those who have no training loop: compiles first, trains weights, scales and tables on, half on
the labels and half on the float model's outputs, and keeps the best state on held-out samples, the start included. Then writes
OUT/model.onnx and its manifest; with --widths a file for every width, OUT/model.w2.onnx and so on, from one training.

DATA has labels: an .npz with 'x' and 'y', a table with --target-column, a folder with a subfolder for each class, or a
loader of pairs. Whole numbers are classes, floats are values. A part is held out, half of it to choose the best state with
and half to measure the result. The bits stay what the recipe says: no error gate answers them with more rows, unless
--goal-sqnr is given, and no SQNR is asked for but by --min-sqnr. States are kept in OUT until files are written; --resume goes
on with them, to the same bytes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_model(parser, "model", positional=True)
    add_data(parser, "data", "samples to train on, inputs scaled as in training, with labels")
    parser.add_argument(
        "--held-out",
        type=fraction,
        default=0.2,
        metavar="SHARE",
        help="share of the samples that is not trained on: half of it chooses the best state, half measures (default 0.2)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model, its manifest and states")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--weights",
        default="lsq",
        metavar="METHOD",
        help="method for weights: lsq, lsq+, dorefa, qil, dsq (default lsq)",
    )
    group.add_argument(
        "--index",
        metavar="METHOD",
        help="method for ranges of tables: lsq, lsq+, pact, dorefa, qil, dsq (default: calibrated ranges stay)",
    )
    group.add_argument("--keep-tables", action="store_true", help="do not train the codes in tables")
    group.add_argument(
        "--widths", type=counts, metavar="BITS,BITS", help="train several widths of weights at once, such as 8,4,3,2"
    )
    group.add_argument(
        "--joins-after",
        type=count,
        default=0,
        metavar="STEPS",
        help="with --widths, let the next narrower one join after so many steps (default 0: all from the beginning)",
    )
    group.add_argument("--epochs", type=count, default=3, metavar="N", help="passes over the samples (default 3)")
    group.add_argument("--batch-size", type=count, default=128, metavar="N", help="samples of a step (default 128)")
    group.add_argument(
        "--learning-rate", type=float, default=0.01, metavar="RATE", help="of the first step (default 0.01)"
    )
    group.add_argument("--resume", action="store_true", help="go on with the states of an interrupted run in OUT")
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice (default 0)")
    add_device(parser, "where it trains")
    add_recipe(parser)
    add_max_drop(parser)


def run(options: argparse.Namespace) -> int:
    """Compile, train on, measure on held-out samples, and write the files unless a threshold is missed."""
    asked = read_recipe(options.recipe, **({"goal_sqnr": None} | recipe_overrides(options)))
    recipe = replace(asked, min_sqnr=None)  # a limit for the trained file, not for the one that training begins with

    import kancompile.qat as qat
    from kancompile.compiler import check_destinations, manifest_path, write_atomically
    from kancompile.compiler import compile as compile_model

    schedule = qat.Schedule(options.epochs, options.batch_size, options.learning_rate, options.seed)
    training = qat.Training(options.weights, options.index, not options.keep_tables)
    folder = Path(options.out)
    widths = options.widths or ()
    paths = {bits: folder / f"model.w{bits}.onnx" for bits in widths} or {None: folder / "model.onnx"}
    check_destinations([*paths.values(), *map(manifest_path, paths.values())], options.force)
    with working(options):
        model = load_float_model(options)
        fitting, choosing, judging = _divided(options, model)
        about = {"seed": options.seed, "device": options.device}
        module: qat.TrainedModel | qat.ElasticModel
        if widths:
            module = qat.prepare_elastic(
                model, fitting, recipe, widths=widths, joins_after=options.joins_after, training=training, **about
            )
            modules: Mapping[int | None, qat.TrainedModel] = {bits: module.at(bits) for bits in paths if bits}
        else:
            module = qat.prepare_compiled(compile_model(model, fitting, recipe=recipe, **about), training)
            modules = {None: module}
        for note in dict.fromkeys(note for one in modules.values() for note in one.notes):
            say(f"note: {note}")
        first = next(iter(modules.values())).compiled
        like = first.calibration
        trained_on, held_out = _labelled(fitting.like(like)), _labelled(choosing.like(like))
        folder.mkdir(parents=True, exist_ok=True)
        module.to(options.device)
        losses = qat.fit(module, trained_on, held_out, schedule, first.captured, folder, options.resume)
        module.to("cpu")
        # labels say what is good: a trained model may leave the float one far behind, and be no worse for it
        least = -math.inf if asked.min_sqnr is None else asked.min_sqnr
        judged = judging.like(like)
        before = {bits: one.compiled.validate(judged, min_sqnr=-math.inf) for bits, one in modules.items()}
        facts = {"choices": str(training), "epochs": options.epochs, "batch_size": options.batch_size}
        facts |= {"rate": options.learning_rate, "seed": options.seed, "widths": list(widths), "samples": len(fitting)}
        written = {bits: _said(qat.convert(one), facts) for bits, one in modules.items()}
        after = {bits: one.validate(judged, min_sqnr=least, max_drop=options.max_drop) for bits, one in written.items()}
    reasons = [reason for one in after.values() for reason in one.reasons]
    contents: dict[Path, bytes | memoryview] = {}
    for bits, one in written.items() if not reasons else ():
        contents |= one.files(paths[bits])
    write_atomically(contents, options.force)
    if not reasons:
        for state in qat.state_files(folder, schedule):
            state.unlink(missing_ok=True)
    report = {
        "paths": [str(path) for path in paths.values()] if not reasons else [],
        "passed": not reasons,
        "held_out_losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
        "notes": list(dict.fromkeys(note for one in modules.values() for note in one.notes)),
        "files": [
            {
                "weight_bits": bits,
                "bytes": len(written[bits].model_bytes),
                "compiled": before[bits].to_dict(),
                "trained": after[bits].to_dict(),
            }
            for bits in paths
        ],
    }
    lines = [_line(bits, before[bits], after[bits]) for bits in paths]
    lines += [after[bits].table() for bits in paths] if len(paths) == 1 else []
    verb = "not written" if reasons else "wrote"
    lines += [f"{verb} {path} ({len(written[bits].model_bytes):,} bytes)" for bits, path in paths.items()]
    show_result(options, report, "\n".join(lines))
    if reasons:
        print(f"kancompile: threshold missed, nothing written: {'; '.join(reasons)}", file=sys.stderr)
    return THRESHOLD_MISSED if reasons else OK


def _divided(options: argparse.Namespace, model: Any) -> tuple[Calibration, Calibration, Calibration]:
    """Read the samples: those to train on, to choose the best state with, and to judge with."""
    import torch

    from kancompile.data import load_calibration, model_inputs

    samples = load_calibration(
        opened_data(options),
        key=options.data_key,
        max_samples=sys.maxsize,
        seed=options.seed,
        name="data",
        model=model_inputs(model),
        keep_integers=True,
    )
    if samples.labels is None:
        raise KanCompileError(
            "--data: found no labels, expected an array 'y' beside 'x' in the .npz, --target-column of a table, a folder with "
            "one subfolder for each class, or a loader of (samples, labels)"
        )
    generator = torch.Generator().manual_seed(options.seed)
    held = round(len(samples) * options.held_out)
    if held < 4 or len(samples) - held < 2:
        raise KanCompileError(
            f"--data: found {len(samples)} samples, of which {held} would be held out, expected 4 of those at least and 2 to "
            "train on; give more samples, or another --held-out"
        )
    fitting, rest = samples.split(held, generator)
    choosing, judging = rest.split(len(rest) // 2, generator)
    return fitting, choosing, judging


def _labelled(samples: Calibration) -> Any:
    from kancompile.qat import Labelled

    labels = samples.labels
    assert labels is not None
    return Labelled(samples.samples, labels)


def _said(compiled: CompiledModel, facts: Mapping[str, Any]) -> CompiledModel:
    """Say in the manifest what the file was trained by; nothing can compile it again from data alone."""
    kept = {key: value for key, value in compiled.manifest.items() if key != "made_from"}
    return replace(compiled, manifest=kept | {"training": dict(facts)})


def _line(bits: int | None, before: Validation, after: Validation) -> str:
    """Say what training gained."""
    name = "" if bits is None else f"W{bits}: "
    for measure, unit in (("accuracy", " %"), ("r2", "")):
        values = [
            one.metrics.get(kind, {}).get(measure)
            for one, kind in ((after, "float"), (before, "compiled"), (after, "compiled"))
        ]
        found = [value for value in values if value is not None]
        if len(found) == len(values):
            texts = [f"{value:.2f}{unit}" if unit else f"{value:.4f}" for value in found]
            on = f"{name}{measure} on {after.n_samples:,} held-out samples"
            return f"{on}: float {texts[0]}, compiled {texts[1]}, trained {texts[2]}"
    return f"{name}{after.n_samples:,} held-out samples"


COMMAND = Command(
    "train", "continue training a compiled model at few bits, and write its files", TEXT, add_options, run
)
