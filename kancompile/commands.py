"""What each command of the command line does; every function takes parsed options and returns an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.command_options import recipe_overrides
from kancompile.command_parser import command_parser
from kancompile.command_session import load_float_model, opened_data, show_result, working
from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.errors.exceptions import KanCompileError
from kancompile.exit_codes import OK, THRESHOLD_MISSED
from kancompile.progress import say
from kancompile.recipe import read_recipe

# What loads PyTorch is imported where it is needed: wrong usage is answered at once, and a recipe needs none of it.
if TYPE_CHECKING:
    from kancompile.compiler.compiled_model import CompiledModel
    from kancompile.data.calibration import Calibration
    from kancompile.targets.contract import Target
    from kancompile.validation.runtime_comparison import RuntimeComparison
    from kancompile.validation.validate import Validation

_COMPARED_SAMPLES = 4096
_MISSED = ".missed"
HONEST_FLOAT = "float by kancompile, ONNX Runtime"


def run_compile(options: argparse.Namespace) -> int:
    """Compile, measure on held-out data, and write the files; where those miss a threshold, no more than a report on that."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))

    from kancompile.compiler.compile import compile as compile_model
    from kancompile.compiler.compiled_model import manifest_path
    from kancompile.compiler.emission import check_target, targets_named
    from kancompile.data.calibration import load_calibration
    from kancompile.report_command import compiled_report, diagnosis_lines, report_files, report_paths
    from kancompile.reporting.render.plots import check_matplotlib
    from kancompile.reporting.render.terminal import compile_summary

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
        # all of the file is read here: what is held out must not be among the samples a compilation picks
        samples = load_calibration(
            opened_data(options),
            key=options.data_key,
            max_samples=max(2, recipe.calibration_samples + int(recipe.calibration_samples * options.held_out)),
            seed=options.seed,
        )
        for note in samples.notes:
            say(f"note: {note}")
        if options.max_drop is not None and samples.labels is None:
            raise KanCompileError(
                "--max-drop: found no labels, expected an array 'y' beside 'x' in the calibration .npz, a folder with one "
                "subfolder for each class, or a loader of (samples, labels)"
            )
        model = load_float_model(options)
        fitting, judging, judged_on = _split(samples, options)
        compiled = compile_model(
            model, fitting, target=targets[0].name, recipe=recipe, seed=options.seed, device=options.device
        )
        result = compiled.validate(judging, min_sqnr=recipe.min_sqnr, max_drop=options.max_drop)
        written, refused = {paths[0]: compiled}, {}
        for target, path in zip(targets[1:], paths[1:], strict=True):
            try:
                written[path] = compiled.for_target(target.name)
            except KanCompileError as error:
                if target.name in options.target:
                    raise
                refused[path] = str(error)  # "all" means all that can
    contents: dict[Path, bytes] = {}
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
    }
    text = "\n".join(
        [
            compile_summary(compiled, result, judged_on),
            *found,
            _written(written, refused, result.passed, reported, contents),
        ]
    )
    show_result(options, report, text)
    if not result.passed:
        missing = f"no model written; {reported[0]} says where the error comes from" if reported else "nothing written"
        print(f"kancompile: threshold missed, {missing}: {'; '.join(result.reasons)}", file=sys.stderr)
    return OK if result.passed else THRESHOLD_MISSED


def run_validate(options: argparse.Namespace) -> int:
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
    from kancompile.validation.validate import validate

    return validate(
        options.file,
        load_float_model(options),
        opened_data(options),
        key=options.data_key,
        min_sqnr=options.min_sqnr,
        max_drop=options.max_drop,
        min_agreement=options.min_agreement,
        threads=options.threads,
    )


def _compared(options: argparse.Namespace) -> RuntimeComparison:
    from kancompile.data.calibration import load_calibration
    from kancompile.validation.runtime_comparison import compare_runtimes, runtimes_named

    runtimes = runtimes_named(options.runtime)
    samples = load_calibration(opened_data(options), key=options.data_key, name="data", max_samples=_COMPARED_SAMPLES)
    return compare_runtimes(Path(options.file), samples.samples.numpy(), runtimes)


def run_benchmark(options: argparse.Namespace) -> int:
    """Time a file beside its float model."""
    from kancompile.validation.benchmark import benchmark
    from kancompile.validation.runtime_timing import timed_runtimes

    runtimes = timed_runtimes(options.runtime)
    with working(options):
        model, data = load_float_model(options), None
        if options.data is not None:
            from kancompile.data.calibration import load_calibration

            data = load_calibration(opened_data(options), key=options.data_key, name="data", seed=options.seed).samples
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

    from kancompile.compiler.compile import compile as compile_model
    from kancompile.runtimes.session import RuntimeModel

    if data is None:
        shape = RuntimeModel(options.file).input_shape
        data = torch.rand(256, *shape, generator=torch.Generator().manual_seed(options.seed)) * 2 - 1
    return compile_model(model, data, recipe={"precision": "float"}, seed=options.seed).session_bytes


def run_inspect(options: argparse.Namespace) -> int:
    """Show a compiled file, or what is found in a model."""
    if (options.file is None) == (options.model is None):
        raise KanCompileError("inspect: expected either a MODEL.onnx file or --model, one of them")

    from kancompile.frontend.capture import capture
    from kancompile.reporting.facts.inspection import (
        describe_file,
        describe_manifest,
        describe_program,
        file_table,
        manifest_table,
        program_table,
    )
    from kancompile.targets import TARGETS
    from kancompile.validation.kernel_audit import audit_kernels

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
            audit = audit_kernels(Path(options.file).read_bytes())
            described["kernels"] = audit.to_dict()
            text += "\n" + audit.table()
        show_result(options, described, text)
        return OK
    with working(options):
        model = load_float_model(options)
        if options.input_shape is None and not str(options.model).endswith(".pt2"):
            raise KanCompileError(
                "inspect: found no --input-shape, expected one sample's shape, such as 784 or 3,32,32"
            )
        program = capture(model, options.input_shape or _exported_shape(model))
    show_result(options, describe_program(program), program_table(program))
    return OK


def run_report(options: argparse.Namespace) -> int:
    """Report on a compiled file (see ``kancompile.report_command``)."""
    from kancompile.report_command import run_report as run

    return run(options)


def run_diagnose(options: argparse.Namespace) -> int:
    """Say why a recipe loses accuracy (see ``kancompile.diagnosis_commands``)."""
    from kancompile.diagnosis_commands import run_diagnose as run

    return run(options)


def run_tune(options: argparse.Namespace) -> int:
    """Change a recipe until targets are met (see ``kancompile.diagnosis_commands``)."""
    from kancompile.diagnosis_commands import run_tune as run

    return run(options)


def run_recipe(options: argparse.Namespace) -> int:
    """Print the recipe that a file and options amount to."""
    recipe = read_recipe(options.recipe, **recipe_overrides(options))
    show_result(options, recipe.to_dict(), recipe.to_toml(with_meanings=True).rstrip())
    return OK


def run_completion(options: argparse.Namespace) -> int:
    """Print the completion script of a shell."""
    from kancompile.shell_completion import completion_script

    script = completion_script(command_parser(), options.shell)
    show_result(options, {"shell": options.shell, "script": script}, script.rstrip())
    return OK


def _exported_shape(model: Any) -> tuple[int, ...]:
    names = set(model.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape[1:] for node in model.graph.nodes if node.op == "placeholder" and node.name in names
    ]
    return tuple(int(size) for size in shapes[0])


def _split(samples: Calibration, options: argparse.Namespace) -> tuple[Calibration, Calibration, str]:
    if options.held_out == 0:
        return samples, samples, "the calibration data itself"
    if not samples.can_be_split:
        say(f"calibration: only {len(samples)} samples, none held out; the result is measured on the same samples")
        return samples, samples, "the calibration data itself"

    import torch

    fitting, judging = samples.split(options.held_out, torch.Generator().manual_seed(options.seed))
    return fitting, judging, f"{len(judging)} held-out calibration samples"


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
    contents: Mapping[Path, bytes],
) -> str:
    lines = []
    for path, compiled in written.items():
        size = f"{compiled.manifest['model_bytes']:,} bytes, {compiled.manifest['deflated_bytes']:,} deflated"
        lines.append(f"wrote {path} ({size})" if passed else f"not written ({size})")
    lines += [f"wrote {path} ({len(contents[path]):,} bytes)" for path in reported]
    lines += [f"not written: {path} ({reason})" for path, reason in refused.items()]
    return "\n".join(lines)
