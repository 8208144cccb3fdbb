"""``kancompile compile``: from a model and data to a file and its manifest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.options import (
    add_classifier,
    add_data,
    add_device,
    add_diagnose,
    add_held_out,
    add_max_drop,
    add_model,
    add_recipe,
    recipe_overrides,
    seed,
)
from kancompile.cli.origin import origin
from kancompile.cli.session import load_float_model, opened_data, show_result, weights_note, working
from kancompile.errors import KanCompileError
from kancompile.processes import Team, joined
from kancompile.progress import say
from kancompile.recipe import read_recipe

if TYPE_CHECKING:
    from kancompile.compiler import CompiledModel
    from kancompile.targets import Target
from kancompile.cli.report import compiled_report, diagnosis_lines, report_files, report_paths

_MISSED = ".missed"
NO_DATA = "none"
"""What --calibration names where there are no data."""
TEXT = """\
examples:
  kancompile compile models.py:make_kan --checkpoint kan.pt --calibration train.npz --out build
  kancompile compile pkg.nets:KAN --factory-arg layers=[784,64,10] --checkpoint kan.safetensors \\
      --calibration train.npz --weight-bits 4 --method gptq --min-sqnr 25 --out build
  kancompile compile model.pt2 --trust-model --calibration train.npz --recipe recipe.toml \\
      --layer layers.0 weight_bits=8 --out build

The calibration data is an .npz with an array 'x' [n, ...] of inputs scaled as in training (and, if you like, labels
'y'), an .npy, a table (.csv, with --target-column NAME for labels), a folder of images (--calibration images --transform
models.py:prepare; one subfolder for each class gives labels), or a loader in your code (--calibration
models.py:make_loader). A few hundred samples are enough.
Where there are none, --calibration none draws inputs from the grid of the first layer, or its batch norm, and says so.
A part of it is held out to measure the result. Writes OUT/model.onnx and OUT/model.manifest.json
(other targets: model.ort, model.c and model.h and so on, beside each other), all or none; where a threshold is missed
nothing is written but the report that --report asks for, OUT/model.missed.report.html."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    add_model(parser, "model", positional=True)
    add_data(parser, "calibration", "inputs scaled as in training")
    parser.add_argument(
        "--dynamic",
        action="append",
        metavar="'x: batch, time, 8'",
        help="leave dimensions other than the batch open, each under a name; repeat for several inputs; auto: all possible",
    )
    add_held_out(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the model and its manifest")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="what to compile for: ort-cpu (default), ort-mobile ..., or all; may be repeated, for several files in DIR",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write a report, OUT/model.report.html and .json (model.missed.report.* where a threshold is missed)",
    )
    add_diagnose(parser)
    parser.add_argument(
        "--no-timing",
        action="store_true",
        help="do not time the file beside the float export; bytes are compared always",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice (default 0)")
    add_device(parser, "where rounding computes its matrices")
    add_recipe(parser)
    add_max_drop(parser)
    add_classifier(parser)


def run(options: argparse.Namespace) -> int:
    """Compile, measure on held-out data, and write the files; where those miss a threshold, no more than a report on that.

    Of several processes that torchrun started, all compile, and the first one measures, prints and writes.
    """
    with joined() as team:
        return _run(options, team)


def _run(options: argparse.Namespace, team: Team) -> int:
    recipe = read_recipe(options.recipe, **recipe_overrides(options))

    from kancompile.compiler import (
        check_destinations,
        check_target,
        manifest_path,
        sampled_inputs,
        targets_named,
        write_atomically,
    )
    from kancompile.compiler import compile as compile_model
    from kancompile.data import check_fits, model_inputs, read_divided
    from kancompile.reporting import compile_summary
    from kancompile.validation import FloatExport, check_matplotlib

    if options.diagnose and not options.report:
        raise KanCompileError(
            "--diagnose: found no --report, in which the diagnosis stands; add it, or run kancompile diagnose"
        )
    if options.report:
        check_matplotlib()
    targets = targets_named(options.target or ["ort-cpu"])
    check_target(targets[0], recipe)
    paths = _paths(Path(options.out), targets)
    shared = len(targets) > 1
    reported = report_paths(paths[0]) if options.report else ()
    check_destinations([*paths, *(manifest_path(path, shared) for path in paths), *reported], options.force)

    with working(options):
        model = load_float_model(options)
        # all of the file is read here: what is held out must not be among the samples a compilation picks
        divided = read_divided(
            sampled_inputs(model, options.seed) if options.data == NO_DATA else opened_data(options),
            recipe.calibration_samples,
            options.held_out,
            options.seed,
            key=options.data_key,
            model=model_inputs(model),
        )
        samples, judging, judged_on = divided.samples, divided.judging, divided.judged_on
        if samples.is_sampled:
            judged_on = f"{len(judging):,} inputs that were sampled too, no data"
        for note in samples.notes:
            say(f"note: {note}")
        if options.max_drop is not None and samples.labels is None:
            raise KanCompileError(
                "--max-drop: found no labels, expected an array 'y' beside 'x' in the calibration .npz, --target-column of a "
                "table, a folder with one subfolder for each class, or a loader of (samples, labels)"
            )
        untrained = weights_note(options)
        made_from = origin(options, recipe, [target.name for target in targets], model)
        if options.held_out and not divided.is_held_out:
            say(f"calibration: only {len(samples)} samples, none held out; the result is measured on the same samples")

        def compiled_together() -> CompiledModel:
            with team.together():
                made = compile_model(
                    model,
                    divided.fitting,
                    target=targets[0].name,
                    also_for=[target.name for target in targets[1:]],
                    recipe=recipe,
                    seed=options.seed,
                    device=options.device,
                    dynamic=options.dynamic,
                )
                team.check_equal(*made.files(paths[0], shared).values())
            return made

        if not team.writes:
            compiled_together()
            return OK
        export = FloatExport(model, check_fits(model, samples).first(2))  # meanwhile, in a process of its own
        try:
            compiled = compiled_together().made_from(made_from)
            result = compiled.validate(
                judging, min_sqnr=recipe.min_sqnr, max_drop=options.max_drop, is_classifier=options.classifier
            )
            beside = compiled.beside_float(timing=not options.no_timing, export=export)
        finally:
            export.close()
        judging = judging.like(compiled.calibration)
        written, refused = {paths[0]: compiled}, {}
        for target, path in zip(targets[1:], paths[1:], strict=True):
            try:
                written[path] = compiled.for_target(target.name)
            except KanCompileError as error:
                if target.name in options.target:
                    raise
                refused[path] = str(error)  # "all" means all that can
    contents: dict[Path, bytes | memoryview] = {}
    found: list[str] = []
    for path, one in written.items() if result.passed else ():
        contents |= one.files(path, shared)
    if options.report:
        # a page about a model that is not written must not stand beside one that an earlier run wrote, as if it were its own
        reported = reported if result.passed else report_paths(paths[0].with_suffix(_MISSED + paths[0].suffix))
        with working(options):
            say("report ...")
            explained = compiled_report(compiled, judging, judged_on, result, paths[0], options.diagnose)
            contents |= report_files(explained, *reported)
            found = diagnosis_lines(explained)
    write_atomically(contents, options.force or not result.passed)
    report = {
        "path": str(paths[0]) if result.passed else None,
        "files": {str(path): len(content) for path, content in contents.items()},
        "refused": {str(path): reason for path, reason in refused.items()},
        "passed": result.passed,
        "report": compiled.report,
        "validation": result.to_dict() | {"data": judged_on},
        "beside_float": beside.to_dict(),
    }
    text = "\n".join(
        [
            compile_summary(compiled, result, judged_on, beside, untrained),
            *found,
            _written(written, refused, result.passed, reported, contents),
        ]
    )
    show_result(options, report, text)
    if not result.passed:
        missing = f"no model written; {reported[0]} says where the error comes from" if reported else "nothing written"
        print(f"kancompile: threshold missed, {missing}: {'; '.join(result.reasons)}", file=sys.stderr)
    return OK if result.passed else THRESHOLD_MISSED


def _paths(folder: Path, targets: Sequence[Target]) -> list[Path]:
    """Name a file for every target: ``model`` and its suffix, with the target's name where another has that already."""
    paths: list[Path] = []
    for target in targets:
        path = folder / f"model{target.suffix}"
        paths.append(folder / f"model.{target.name}{target.suffix}" if path in paths else path)
    return paths


def _written(
    written: Mapping[Path, CompiledModel],
    refused: Mapping[Path, str],
    passed: bool,
    reported: Sequence[Path],
    contents: Mapping[Path, bytes | memoryview],
) -> str:
    lines = []
    for path, compiled in written.items():
        facts = compiled.manifest
        size = f"{facts['model_bytes']:,} bytes"
        if "deflated_bytes" in facts:
            size += f", {facts['deflated_bytes']:,} deflated"
        if "stored_bytes" in facts:  # source code, whose own length says nothing
            size = f"{facts['stored_bytes']:,} bytes of flash for constants, {facts['ram_bytes']:,} bytes of RAM"
        lines.append(f"wrote {path} ({size})" if passed else f"not written ({size})")
    lines += [f"wrote {path} ({len(contents[path]):,} bytes)" for path in reported]
    lines += [f"not written: {path} ({reason})" for path, reason in refused.items()]
    return "\n".join(lines)


COMMAND = Command("compile", "compile a model to an ONNX file", TEXT, add_options, run)
