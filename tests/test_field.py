"""The field: its networks answer as their tasks ask, one of them is compiled and measured, and the table says what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import field
from benchmarks.digit_models import build_seeded
from benchmarks.field_tasks import FIELD, FieldModel, train_model
from benchmarks.marked_section import marked_section, replace_section
from benchmarks.results_file import read_results


@pytest.mark.parametrize("model", FIELD, ids=lambda model: model.name)
def test_networks_answer_in_the_form_of_their_targets(model: FieldModel) -> None:
    inputs, targets = model.examples().part(True)
    network = build_seeded(model.build).eval()
    with torch.no_grad():
        outputs = network(*(value[:4] for value in inputs.values()))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(len(output) == 4 for output in outputs)
    scores = model.score(outputs, [target[:4] for target in targets])
    assert all(torch.isfinite(torch.tensor(score)) for score in scores.values())
    assert field.count_kan_layers(network, inputs) >= 2


@pytest.mark.slow
def test_a_network_is_trained_compiled_and_measured() -> None:
    model = replace(next(model for model in FIELD if model.name.startswith("graph")), epochs=2)
    row = field.measured(model, 0)
    assert "error" not in row
    assert row["kan_layers"] == row["kan_layers_found"] == row["kan_layers_integer"] == 3
    assert row["worst_db"] > 30
    assert abs(row["float_score"]["accuracy"] - row["compiled_score"]["accuracy"]) < 2
    assert row["peak_mib"] >= row["mib_before"] > 0
    assert "bmm" in {part["operator"] for part in row["left_in_float"]}


def test_training_is_seeded() -> None:
    model = replace(next(model for model in FIELD if model.name.startswith("mixture")), epochs=1)
    first, second = (train_model(model, model.examples()).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_stored_figures_are_those_of_the_page() -> None:
    rows = read_results(field.FIGURES)
    assert list(rows) == [model.name for model in FIELD]
    page = (Path(__file__).parent.parent / field.PAGE).read_text(encoding="utf-8")
    assert marked_section(page, "field") == field.section(rows).strip("\n")
    assert sum(bool(field.behind(row)) for row in rows.values()) <= 2


def test_what_got_worse_is_found() -> None:
    row = {"bytes": 1000, "worst_db": 40.0, "kan_layers_integer": 3}
    assert field.worse(row, row) == []
    assert field.worse(row, {"bytes": 1021, "worst_db": 39.4, "kan_layers_integer": 2}) == [
        "bytes 1,000 -> 1,021",
        "worst_db 40 -> 39.4",
        "kan_layers_integer 3 -> 2",
    ]
    assert field.worse(row, {"error": "lost"}) == ["lost"]
    assert field.worse({"error": "lost"}, row) == []


def test_a_section_is_put_where_it_stood() -> None:
    page = replace_section("# Page\n", "field", "one\n")
    assert page == "# Page\n\n<!-- field: begin -->\none\n<!-- field: end -->\n"
    assert marked_section(page, "field") == "one"
    assert replace_section(page + "rest\n", "field", "two") == page.replace("one", "two") + "rest\n"
    assert marked_section("# Page\n", "field") is None
