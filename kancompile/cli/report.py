"""``kancompile report``, and the report that ``kancompile compile --report`` writes beside the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import add_data, add_diagnose, add_held_out, add_model, count
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError

if TYPE_CHECKING:
    from kancompile.compiler import CompiledModel
    from kancompile.data import Calibration
    from kancompile.validation import Validation

_JUDGED_SAMPLES = 4096
TEXT = """\
examples:
  kancompile report build/model.onnx --against models.py:make_kan --checkpoint kan.pt --data train.npz
  kancompile report build/model.onnx --against models.py:make_kan --checkpoint kan.pt \\
      --calibration train.npz --data test.npz --edge layers.0:3,17 --out report.html --figures figures

Writes one HTML page that opens offline, and its data as JSON: accuracy, size and time before and after, the error that every
layer and branch brings, ranges, kernels, and the edge functions before and after. The tables are made again from the data
that the file was compiled with, which is compared by hash: --calibration, or --data where that is the same file."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Say what a report is about and what it draws."""
    parser.add_argument("file", metavar="MODEL.onnx", help="compiled file")
    add_model(parser, "--against")
    add_data(parser, "calibration", "data of the compilation (default: --data)", required=False, dest="calibration")
    add_held_out(parser)
    add_data(parser, "data", "inputs to measure with (default: the held-out samples)", required=False)
    parser.add_argument("--out", metavar="FILE.html", help="page to write (default: MODEL.report.html beside the file)")
    parser.add_argument(
        "--figures", metavar="DIR", help="also write the figures as files for a paper, each as SVG, PDF and PNG"
    )
    parser.add_argument(
        "--node-data",
        metavar="FILE.json",
        help="also write the error of each node's layer as node data for Model Explorer",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "--edge", action="append", default=[], metavar="LAYER:OUT,IN", help="an edge to draw; may be repeated"
    )
    parser.add_argument("--edges", type=count, default=12, metavar="N", help="important edges to draw (default 12)")
    add_diagnose(parser)
    parser.add_argument("--no-sweep", action="store_true", help="do not try other weight bits")
    parser.add_argument("--no-latency", action="store_true", help="measure no times, which differ from run to run")


def report_paths(model: Path) -> tuple[Path, Path]:
    """Return where the page and the data of a report stand: ``model.onnx`` -> ``model.report.html``, ``model.report.json``."""
    return model.with_name(f"{model.stem}.report.html"), model.with_name(f"{model.stem}.report.json")


def report_files(report: Mapping[str, Any], page: Path, data: Path) -> dict[Path, bytes]:
    """Give the content of both files; equal data give equal bytes."""
    from kancompile.reporting import render

    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    return {page: render(report).encode(), data: text.encode()}


def compiled_report(
    compiled: CompiledModel,
    judging: Calibration,
    judged_on: str,
    result: Validation,
    path: Path,
    diagnose: bool = False,
) -> dict[str, Any]:
    """Compute the report of a compilation that has just ended."""
    from kancompile.reporting import ReportOptions, collect, of_compiled

    return collect(of_compiled(compiled, judging, judged_on, result, path.name), ReportOptions(diagnose=diagnose))


def run(options: argparse.Namespace) -> int:
    """Report on a compiled file."""
    from kancompile.compiler import check_destinations, write_atomically
    from kancompile.reporting import figure_names, node_data, report_figures
    from kancompile.validation import check_matplotlib

    check_matplotlib()
    path = Path(options.file)
    page, data = report_paths(path)
    if options.out is not None:
        page = Path(options.out)
        if page.suffix != ".html":
            raise KanCompileError(f"--out: found {options.out!r}, expected a name that ends with .html")
        data = page.with_suffix(".json")
    drawn = [] if options.figures is None else [Path(options.figures) / name for name in figure_names()]
    nodes = None if options.node_data is None else Path(options.node_data)
    check_destinations([page, data, *drawn, *(() if nodes is None else (nodes,))], options.force)
    with working(options):
        from kancompile.data import load_calibration, model_inputs
        from kancompile.reporting import ReportOptions, collect, of_file, recipe_and_seed

        recipe, seed = recipe_and_seed(path)
        model = load_float_model(options)
        calibration, held_out = _calibration(options, model, recipe.calibration_samples, seed, path)
        if options.data is not None:
            judging = load_calibration(
                opened_data(options),
                key=options.data_key,
                max_samples=_JUDGED_SAMPLES,
                name="data",
                model=model_inputs(model),
                keep_integers=True,
            ).like(calibration)
            judged_on = f"{len(judging)} samples of {Path(options.data).name}"
        elif held_out is not None:
            judging, judged_on = held_out, f"{len(held_out):,} held-out calibration samples"
        else:
            judging, judged_on = calibration, "the calibration data itself"
        source = of_file(path, model, calibration, judging, judged_on, options.data is not None)
        wanted = ReportOptions(
            tuple(options.edge),
            options.edges,
            sweep=not options.no_sweep,
            latency=not options.no_latency,
            diagnose=options.diagnose,
        )
        report = collect(source, wanted)
        files = report_files(report, page, data)
        if options.figures is not None:
            files |= {Path(options.figures) / name: content for name, content in report_figures(report).items()}
        if nodes is not None:
            files[nodes] = (json.dumps(node_data(report, source.session_bytes), indent=1) + "\n").encode()
    write_atomically(files, options.force)
    show_result(options, report, _text(report, files))
    return OK


def _calibration(
    options: argparse.Namespace, model: Any, limit: int, seed: int, path: Path
) -> tuple[Calibration, Calibration | None]:
    """Find the samples that the file was compiled with: all of the given ones, or those that were not held out."""
    from kancompile.data import check_fits, load_calibration, model_inputs, read_divided
    from kancompile.reporting import calibration_hash

    if options.calibration is None and options.data is None:
        raise KanCompileError("report: found neither --calibration nor --data, expected the data of the compilation")
    given = opened_data(options, "data" if options.calibration is None else "calibration")
    name, key = (
        ("calibration", options.calibration_key) if options.calibration is not None else ("data", options.data_key)
    )
    wanted = calibration_hash(path)
    inputs = model_inputs(model)
    divided = read_divided(given, limit, options.held_out, seed, key=key, name=name, model=inputs)
    fitting = check_fits(model, divided.fitting)
    if fitting.sha256() == wanted:
        return fitting, divided.judging.like(fitting) if divided.is_held_out else None
    # a file that Python compiled with all samples
    whole = load_calibration(given, key=key, max_samples=limit, seed=seed, name=name, model=inputs, keep_integers=True)
    return whole.like(fitting), None


def _text(report: Mapping[str, Any], files: Mapping[Path, bytes]) -> str:
    lines = [f"{f['severity']}: {f['where']}: {f['text']}" for f in report["findings"]] or ["nothing stands out"]
    lines += diagnosis_lines(report)
    measured = [layer for layer in report["layers"] if layer["alone"] is not None]
    for layer in sorted(measured, key=lambda layer: -float(layer["alone"]["noise_share"]))[:3]:
        share = f"{100 * layer['alone']['noise_share']:.1f} % of the error at the output"
        lines += [f"{layer['name']}: {share}"]
    return "\n".join([*lines, *(f"wrote {path} ({len(content):,} bytes)" for path, content in files.items())])


def diagnosis_lines(report: Mapping[str, Any]) -> list[str]:
    """Say the causes that stand out, each with its change and what that was measured to bring; nothing without a diagnosis."""
    if report["diagnosis"] is None:
        return []
    standing = [cause for cause in report["diagnosis"]["causes"] if cause["stands_out"]]
    lines = []
    for cause in standing:
        gain = cause["effect"]["measured_db"]
        brings = "" if gain is None else f" ({gain:+.1f} dB)" if isinstance(gain, int | float) else f" ({gain} dB)"
        lines.append(f"diagnosis: {cause['kind']}: {cause['title']}: {cause['change']['text']}{brings}")
    return lines or ["diagnosis: nothing stands out"]


COMMAND = Command("report", "explain a compiled file on one HTML page", TEXT, add_options, run)
