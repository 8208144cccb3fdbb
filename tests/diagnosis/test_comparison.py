"""Methods and widths side by side: as compiled one by one, resumed, divided between processes, drawn."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch

import kancompile
from kancompile.diagnosis.comparison import Comparison, compare
from kancompile.diagnosis.comparison_cells import Cell, CellFiles
from kancompile.diagnosis.laboratory import Outcome
from kancompile.errors import KanCompileError
from kancompile.recipe import Recipe
from kancompile.reporting import FORMATS, comparison_figure
from kancompile.validation import Score
from tests.compiled_kan import make_inputs, make_model

BITS = (4, "ternary")
METHODS = ("uniform", "gptq")


def _samples() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    model, x, test = make_model(), make_inputs(90), make_inputs(60, seed=1)
    return (x, model(x).argmax(1)), (test, (model(test).argmax(1) + (torch.arange(60) % 20 == 0)) % 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def compared(folder: Path) -> Comparison:
    fitting, judging = _samples()
    return compare(make_model(), fitting, judging, methods=METHODS, bits=BITS, folder=folder, recipe={"lookup": "each"})


@pytest.mark.slow
def test_a_cell_is_what_a_compilation_makes(compared: Comparison) -> None:
    fitting, (x, y) = _samples()
    cell = next(cell for cell in compared.cells if (cell.method, cell.weight_bits) == ("gptq", 4))
    recipe = {"method": "gptq", "weight_bits": 4, "goal_sqnr": None, "lookup": "each"}
    compiled = kancompile.compile(make_model(), fitting, recipe=recipe)
    assert cell.file_bytes == len(compiled.model_bytes)
    # accuracy as counted here, without any of the measures of the package
    decided = compiled.program(x).argmax(1)  # type: ignore[union-attr]
    right = int((decided == y).sum())
    assert cell.outcome is not None
    assert cell.outcome.score == pytest.approx(100 * right / 60)
    paired = cell.outcome.paired
    assert paired is not None
    assert (paired.n, paired.right) == (60, int((make_model()(x).argmax(1) == y).sum()))
    assert paired.accuracy_interval[0] < cell.outcome.score < paired.accuracy_interval[1]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_gives_the_same_table(
    folder: Path, compared: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting, judging = _samples()
    whole = compared.csv()
    (folder / "cells" / "gptq-4.json").unlink()
    again = compare(
        make_model(), fitting, judging, methods=METHODS, bits=BITS, folder=folder, recipe={"lookup": "each"}
    )
    assert again.csv() == whole
    assert "3 of 4 cells were measured before" in capsys.readouterr().err
    rows = list(csv.DictReader(io.StringIO(whole)))
    assert [(row["method"], row["weight_bits"]) for row in rows] == [(m, str(b)) for m in METHODS for b in BITS]
    assert all(float(row["score_low"]) < float(row["score"]) < float(row["score_high"]) for row in rows)
    assert "bytes" in compared.table()


@pytest.mark.slow
def test_cells_of_something_else_are_refused(folder: Path, compared: Comparison) -> None:
    (x, _), judging = _samples()
    with pytest.raises(KanCompileError, match=r"cell .*uniform-4\.json': measured with another fitting, expected"):
        compare(make_model(), x + 0.1, judging, methods=METHODS, bits=[4], folder=folder, recipe={"lookup": "each"})
    with pytest.raises(KanCompileError, match="method"):
        compare(make_model(), x, judging, methods=["gtpq"])
    with pytest.raises(KanCompileError, match="a folder for their cells"):
        compare(make_model(), x, judging, processes=2)


@pytest.mark.slow
def test_what_a_method_cannot_do_is_a_row(folder: Path, compared: Comparison) -> None:
    fitting, judging = _samples()
    with_hawq = ["hawq-v2", "gptq"]
    found = compare(
        make_model(), fitting, judging, methods=with_hawq, bits=["ternary"], folder=folder, recipe={"lookup": "each"}
    )
    assert found.cells[0].outcome is None
    assert "which allocates whole bits" in found.table()
    assert found.cells[1] == compared.cells[3]


@pytest.mark.slow
def test_processes_measure_the_same(compared: Comparison, tmp_path: Path) -> None:
    fitting, judging = _samples()
    options = {"methods": METHODS, "bits": BITS, "recipe": {"lookup": "each"}}
    several = compare(make_model(), fitting, judging, folder=tmp_path, processes=2, **options)  # type: ignore[arg-type]
    assert several.csv() == compared.csv()


OUTCOME = Outcome(100.0, 1.0, 18.0, "accuracy", 95.0, 1.0, 98.0, 1234, 100, 96, 2, 1)


def _measured(method: str, width: int | str, file_bytes: int) -> Cell:
    return Cell(method, width, OUTCOME, file_bytes)


def test_cells_are_read_as_they_were_written(tmp_path: Path) -> None:
    files = CellFiles(tmp_path, {"model": "a", "seed": 0})
    cell = _measured("awq+gptq", "ternary", 2000)
    files.write(cell)
    assert [path.name for path in tmp_path.glob("*.json")] == ["awq-gptq-ternary.json"]
    assert files.read("awq+gptq", "ternary") == cell
    assert files.read("awq+gptq", 2) is None
    other = {"model": "b", "seed": 0}
    with pytest.raises(KanCompileError, match="measured with another model, expected the same as now"):
        CellFiles(tmp_path, other).read("awq+gptq", "ternary")
    assert CellFiles(tmp_path, other, force=True).read("awq+gptq", "ternary") is None
    files.path("gptq", 2).write_text('{"key": "x"')
    with pytest.raises(KanCompileError, match=r"cell .*gptq-2\.json': found no measurement"):
        files.read("gptq", 2)


def test_processes_need_a_folder_and_names_are_checked() -> None:
    with pytest.raises(KanCompileError, match="a folder for their cells"):
        compare(make_model(), make_inputs(), processes=2)
    with pytest.raises(KanCompileError, match="gtpq"):
        compare(make_model(), make_inputs(), methods=["gtpq"])


@pytest.mark.needs("matplotlib")
def test_tables_and_figures_are_equal_bytes_for_equal_data() -> None:
    cells = (_measured("gptq", 4, 900), _measured("gptq", "ternary", 500), Cell("brecq", 4, None, None, "no blocks"))
    comparison = Comparison(cells, Score("accuracy", 96.0), "100 samples", Recipe())
    lines = comparison.table().splitlines()
    assert [line.rstrip().endswith("*") for line in lines[2:4]] == [False, True]  # the smaller of two equally good ones
    assert "no blocks" in lines[4]
    rows = list(csv.DictReader(io.StringIO(comparison.csv())))
    assert [row["file_bytes"] for row in rows] == ["900", "500", ""]
    assert float(rows[0]["score_low"]) < 95 < float(rows[0]["score_high"])
    figures = {kind: comparison_figure(comparison.to_dict(), kind) for kind in FORMATS}
    for kind, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        assert figures[kind].startswith(start)
    text = figures["svg"].decode()
    assert all(name in text for name in ("gptq", "ternary", "points of accuracy lost"))
    assert figures["svg"] == comparison_figure(json.loads(json.dumps(comparison.to_dict())), "svg")
