"""Measure which KAN families compile, and how well; writes the table of docs/compatibility.md.

Run from the root of the repository::

    python -m benchmarks.compatibility
    python -m benchmarks.compatibility --check      # compare with the stored figures, as make bench-check does
    python -m benchmarks.compatibility --only "zoo" --folder FOLDER --out table.md --results results.json

Every model is trained briefly on scikit-learn's digits, captured, lowered to float and to 8-bit integers, and compared
with PyTorch in ONNX Runtime. What cannot be compiled stands in the table with the text of its error. A folder may hold
further models: Python files with ``build() -> nn.Module`` and, where they differ, ``SHAPE`` (of one input, 64 elements),
``EPOCHS``, ``LEARNING_RATE``, ``FAMILY`` and ``LIMITS``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import kancompile
from benchmarks.client_models import CLIENTS
from benchmarks.digit_models import Digits, FamilyModel, build_seeded, load, train
from benchmarks.marked_section import FIELD_SECTION, marked_section, replace_section
from benchmarks.results_file import read_results, write_results
from benchmarks.zoo_models import ZOO
from kancompile.compiler.atomic_write import write_atomically
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import PolynomialExpansion, Program
from kancompile.passes.lowering import lower
from kancompile.progress import quiet
from kancompile.recipe import read_recipe
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from kancompile.validation.benchmark import FLOAT_EXPORT, benchmark
from kancompile.validation.float_export import FloatExport

BATCH = 32
CALIBRATION = 512
WIDE = 4.0


@dataclass
class Row:
    """What was measured of one model.

    Attributes:
        family, source, limits: as in the model.
        accuracy: of the float model on the test digits, in percent.
        layers: KAN layers captured.
        left: operators that stay as they are, with the reason.
        float_error: largest error of the float file in ONNX Runtime, relative to the largest output, on the test digits
            and on inputs 4 times as large.
        float_form: expansions lowered to polynomials, of all.
        float_reason: why it cannot be lowered to float; empty if it can.
        sqnr: of the default file's outputs on the test digits, about their means, in dB.
        worst: of its worst output.
        bytes, float_bytes: of the file and of the float ONNX export.
        layer_sqnr: least over the layers, errors of earlier layers included, in dB.
        own_sqnr: least over the layers, each with the inputs that it has in the float model, in dB.
        agreement: test digits with the same argmax, in percent.
        drop: points of accuracy lost.
        speedup: time of the float ONNX export over that of the 8-bit file, batch 32, one thread; ``None`` if there is none.
        export_error: why the float model has no ONNX export.
        error: why it does not compile; empty if it does.
    """

    family: str
    source: str
    limits: str = ""
    accuracy: float | None = None
    layers: int = 0
    left: list[str] = field(default_factory=list)
    float_error: float | None = None
    float_form: str = ""
    float_reason: str = ""
    sqnr: float | None = None
    worst: float | None = None
    bytes: int | None = None
    float_bytes: int | None = None
    layer_sqnr: float | None = None
    own_sqnr: float | None = None
    agreement: float | None = None
    drop: float | None = None
    speedup: float | None = None
    export_error: str = ""
    error: str = ""


def measure(model: FamilyModel, repeats: int, log: Callable[[str], None]) -> Row:
    """Train, compile and compare one model; errors become part of the row. Without ``repeats`` only the default file."""
    row = Row(model.family, model.source, model.limits)
    try:
        digits = load(model.shape)
        built = build_seeded(model.build)
        row.accuracy = train(built, digits, model.epochs, model.learning_rate)
        captured = _measure_integer(row, built, digits, repeats)
    except Exception as error:  # every failure belongs into the table
        row.error = _text(error)
        log(f"  {row.error}")
        return row
    if not repeats:
        return row
    try:
        _measure_float(row, built, captured, digits)
    except Exception as error:
        row.float_reason = _text(error)
        log(f"  {row.float_reason}")
    return row


def _text(error: Exception) -> str:
    return f"{'' if isinstance(error, KanCompileError) else type(error).__name__ + ': '}{error}"


def _measure_float(row: Row, model: nn.Module, captured: Program, digits: Digits) -> None:
    recipe = read_recipe({"precision": "float"})
    program = lower(captured, digits.x_train[:CALIBRATION], recipe)
    session = RuntimeModel(TARGETS["ort-cpu"].emit(program, {}, recipe.storage))
    row.float_error = 0.0
    for x in (digits.x_test, WIDE * digits.x_test):
        with torch.no_grad():
            expected = model(x)
        usable = torch.isfinite(expected)
        error = (session(x) - expected)[usable].abs().max() / expected[usable].abs().max()
        row.float_error = max(row.float_error, float(error))
    forms = [type(program.module(target)) for layer in program.layers() for target in layer.expansions]
    row.float_form = f"{sum(form is PolynomialExpansion for form in forms)}/{len(forms)}"


def _measure_integer(row: Row, model: nn.Module, digits: Digits, repeats: int) -> Program:
    compiled = kancompile.compile(model, digits.x_train[:CALIBRATION])
    captured = compiled.captured
    row.layers = len(captured.layers())
    row.left = sorted({f"{part.operator.removeprefix('aten.')}: {part.reason}" for part in captured.unrecognized})
    result = kancompile.validate(
        compiled.model_bytes,
        model,
        digits.x_test,
        digits.y_test,
        program=compiled.program,
        float_program=compiled.captured,
    )
    row.sqnr, row.worst, row.bytes = result.compiled.sqnr_db, result.compiled.worst_db, len(compiled.model_bytes)
    row.layer_sqnr = min(layer.sqnr_db for layer in result.layers)
    row.own_sqnr = min(layer.own_sqnr_db for layer in result.layers if layer.own_sqnr_db is not None)
    row.agreement, row.drop = result.compiled.agreement, result.drop
    if not repeats:
        return captured
    with contextlib.suppress(KanCompileError):  # the benchmark says why there is none
        row.float_bytes = len(FloatExport(model, digits.x_test.shape[1:]).result())
    timed = benchmark(compiled.model_bytes, model, [BATCH], [1], repeats=repeats, data=digits.x_test)
    row.export_error = timed.unavailable.get(FLOAT_EXPORT, "")
    if not row.export_error:
        row.speedup = timed.ratio(FLOAT_EXPORT, BATCH, 1)
    return captured


def folder_models(folder: Path) -> Iterator[FamilyModel]:
    """Load the models of a folder, one Python file each.

    Raises:
        SystemExit: a file has no ``build``.
    """
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"folder_model_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            build = module.build
        except Exception as error:
            reason = f"{path.name} cannot be loaded: {type(error).__name__}: {error}"
            yield FamilyModel(path.stem, path.name, _failing(reason))
            continue
        yield FamilyModel(
            getattr(module, "FAMILY", path.stem),
            getattr(module, "SOURCE", path.name),
            build,
            getattr(module, "SHAPE", (64,)),
            getattr(module, "EPOCHS", 8),
            getattr(module, "LEARNING_RATE", 2e-3),
            getattr(module, "LIMITS", ""),
        )


def _failing(reason: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        raise RuntimeError(reason)

    return build


def table(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table, and the reasons below it."""
    head = ["family", "model", "float accuracy", "KAN layers", "float lowering error", "SQNR", "worst output"]
    head += [
        "worst layer",
        "worst layer alone",
        "top-1 agreement",
        "accuracy lost",
        "bytes",
        "smaller",
        "faster",
        "limits",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    footnotes: list[str] = []
    for row in rows:
        limits = [row.limits] if row.limits else []
        reasons = (
            row.error,
            row.float_reason and f"float lowering: {row.float_reason}",
            row.export_error and f"float export: {row.export_error}",
        )
        for text in reasons:
            if text:
                footnotes.append(text)
                limits.append(f"reason {len(footnotes)}")
        cells = (
            row.family,
            row.source,
            _number(row.accuracy, ".1f", " %"),
            str(row.layers) if row.layers else "none",
            _number(row.float_error, ".1e"),
            _number(row.sqnr, ".1f", " dB"),
            _number(row.worst, ".1f", " dB"),
            _number(row.layer_sqnr, ".1f", " dB"),
            _number(row.own_sqnr, ".1f", " dB"),
            _number(row.agreement, ".1f", " %"),
            _number(row.drop, ".1f"),
            _number(row.bytes, ","),
            "" if row.bytes is None or row.float_bytes is None else f"{row.float_bytes / row.bytes:.1f}x",
            _number(row.speedup, ".1f", "x"),
            ", ".join(limits),
        )
        lines.append("| " + " | ".join(cells) + " |")
    if footnotes:
        lines += ["", "Reasons, as the error texts say:", ""]
        lines += [f"{number}. {' '.join(text.split())}" for number, text in enumerate(footnotes, 1)]
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def page(rows: Sequence[Row]) -> str:
    """Write docs/compatibility.md."""
    compiled = [row for row in rows if not row.error]
    wide = [row for row in compiled if row.float_error is not None and row.float_error > 1e-5]
    coarse = [row for row in compiled if row.layer_sqnr is not None and row.layer_sqnr < 35]
    alone = [row for row in compiled if row.own_sqnr is not None and row.own_sqnr < 35]
    ruined = [row for row in compiled if row.worst is not None and row.worst < 30]
    larger = [
        row for row in compiled if row.bytes is not None and row.float_bytes is not None and row.bytes > row.float_bytes
    ]
    slower = [row for row in compiled if row.speedup is not None and row.speedup < 1]
    rate = statistics.median(row.speedup for row in compiled if row.speedup is not None) if compiled else 0.0
    return f"""{HEAD}
{len(compiled)} of {len(rows)} models compile. Median speed-up {rate:.1f}x.
{_exceptions("Worst output below 30 dB", [(row, f"{row.worst:.1f} dB") for row in ruined])}
{_exceptions("Larger than the float export", [(row, f"{(row.bytes or 0) / (row.float_bytes or 1):.1f}x") for row in larger])}
{_exceptions("Slower than the float export", [(row, f"{row.speedup:.1f}x") for row in slower])}
{_exceptions("Float lowering error above 1e-5", [(row, f"{row.float_error:.1e}") for row in wide])}
{_exceptions("Layers below 35 dB, earlier layers' errors included", [(row, f"{row.layer_sqnr:.1f} dB") for row in coarse])}
{_exceptions("Layers below 35 dB alone", [(row, f"{row.own_sqnr:.1f} dB") for row in alone])}

{table(rows)}

## What stays outside

Operators that no KAN layer holds keep running as they are, in float or with QDQ; the analysis stopped there with this reason:

{_left(rows)}
"""


def _exceptions(what: str, found: Sequence[tuple[Row, str]]) -> str:
    named = ", ".join(f"{row.family} of {row.source} ({value})" for row, value in found)
    return f"{what}: {named or 'none'}."


def _left(rows: Sequence[Row]) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        for part in row.left:
            by_reason.setdefault(part, []).append(f"{row.family} ({row.source})")
    lines = ["| operator and reason | in |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {reason} | {', '.join(names)} |" for reason, names in sorted(by_reason.items()))])


HEAD = """# Which KANs compile, and how well

Generated by `python -m benchmarks.compatibility`; do not edit. Every model is small, trained briefly on scikit-learn's 8x8
digits (64 inputs, 1,347 training and 450 test images), and measured on the test images in ONNX Runtime:

* **float lowering error**: `precision = "float"` against PyTorch, largest difference over the largest output, on test images
  and on inputs 4 times as large, outside every grid;
* **SQNR**: what the default recipe makes, whose error gate helps where an output stays below 30 dB: signal about its mean over
  error, of all outputs together and of the worst one; then at the worst layer, with the errors of earlier layers and alone, on
  the inputs that it has in the float model;
* **bytes**, **smaller**: of the file, and how many times as large the float ONNX export is;
* **faster**: time of the float ONNX export over that of the file, batch 32, one thread, interleaved in one process, medians.

A model that does not compile has the text of its error as reason.
"""


FIGURES = Path(__file__).with_name("compatibility.json")
_MORE_BYTES, _LESS_DB = 1.02, 0.5


def figures(row: Row) -> dict[str, float | None]:
    """Give what must not get worse: bytes, and dB of all outputs and of the worst one."""
    return {"bytes": row.bytes, "sqnr": row.sqnr, "worst": row.worst}


def worse(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[str]:
    """List what got worse: bytes by 2 %, or dB by 0.5; a figure that is gone is worse, too."""
    found = []
    for name, old in before.items():
        new = after.get(name)
        if old is None:
            continue
        if new is None:
            found.append(f"{name} {old:,.6g} -> none")
        elif new > _MORE_BYTES * old if name == "bytes" else new < old - _LESS_DB:
            found.append(f"{name} {old:,.6g} -> {new:,.6g}")
    return found


def check(models: Sequence[FamilyModel]) -> int:
    """Measure bytes and dB again, print what got worse, and give the exit code."""
    stored, failed = read_results(FIGURES), 0
    for model in models:
        key = f"{model.family}, {model.source}"
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            row = measure(model, 0, lambda text: None)
        found = worse(stored.get(key, {}), figures(row)) + ([row.error] if row.error and key in stored else [])
        failed += bool(found)
        print(f"{key}: {'; '.join(found) or 'as good' if key in stored else 'not stored'}", flush=True)
    print(f"{failed} of {len(models)} got worse")
    return 1 if failed else 0


def main() -> int:
    """Measure and write the page, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of further models, measured instead of the built-in ones")
    parser.add_argument("--only", default="", help="measure only models whose family or source contains this")
    parser.add_argument("--repeats", type=int, default=15, help="blocks of 50 ms a candidate (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, help="JSON file that keeps results; what is in it is not measured again"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare bytes and dB with the stored figures; write nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = read_results(arguments.results) if arguments.results and arguments.results.is_file() else {}
    models = [*ZOO, *CLIENTS] if arguments.folder is None else list(folder_models(arguments.folder))
    if arguments.check:
        return check([model for model in models if arguments.only in f"{model.family}, {model.source}"])
    rows = []
    for model in models:
        key = f"{model.family}, {model.source}"
        if arguments.only not in key:
            continue
        if key not in known:
            print(key, flush=True)
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                known[key] = asdict(measure(model, arguments.repeats, print))
            if arguments.results:
                write_results(arguments.results, known)
        rows.append(Row(**known[key]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = page(rows)
    kept = marked_section(arguments.out.read_text(encoding="utf-8"), FIELD_SECTION) if arguments.out.is_file() else None
    if kept is not None:  # what benchmarks.field writes there
        text = replace_section(text, FIELD_SECTION, kept)
    write_atomically({arguments.out: text.encode()}, force=True)
    print(f"wrote {arguments.out}", file=sys.stderr)
    if arguments.folder is None and not arguments.only:
        write_results(FIGURES, {f"{row.family}, {row.source}": figures(row) for row in rows if not row.error})
    return 0


if __name__ == "__main__":
    sys.exit(main())
