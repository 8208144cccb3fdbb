"""The diagnosis in a report: that of the compiled file, in data that fit the schema, and on the page."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kancompile.cli.main import main
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.render.html import render
from kancompile.reporting.schema import report_schema
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_inputs, make_model
from tests.diagnosis.planted_faults import samples, trained
from tests.reporting.report_sources import opened, source_of

HIDDEN = "layers.1"
DIAGNOSED = ReportOptions(edge_count=0, sweep=False, float_export=False, latency=False, diagnose=True)
FAULTS: dict[str, dict[str, Any]] = {
    "weight bits": {"layers": {HIDDEN: {"weight_bits": 2}}, "goal_sqnr": None},
    "hand-over range": {"layers": {HIDDEN: {"range": "percentile", "percentile": 75.0}}, "goal_sqnr": None},
}


@lru_cache
def source(fault: str) -> Any:
    x = torch.from_numpy(samples("calibration").x)
    return source_of(trained("efficient_kan"), x, samples("test").pair, FAULTS.get(fault, {}))


@lru_cache
def report(fault: str) -> dict[str, Any]:
    return collect(source(fault), DIAGNOSED)


class Text(HTMLParser):
    """Collect the text of every section, and the tags of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: set[str] = set()
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "section":
            self._inside = dict(attrs)["id"]
            self.sections[self._inside] = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.sections[self._inside] += data


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_its_change_does_what_the_report_says(fault: str) -> None:
    found = report(fault)
    jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), report_schema())
    diagnosis = found["diagnosis"]
    first = diagnosis["causes"][0]
    assert first["stands_out"]
    assert not diagnosis["healthy"]
    assert (first["kind"], first["layers"]) == (fault, [HIDDEN])
    # what is diagnosed is what the file computes, and what the change brings is what compiling with it brings
    assert diagnosis["outcome"]["sqnr_db"] == pytest.approx(found["summary"]["sqnr_db"], abs=0.01)
    recipe = source(fault).recipe.with_overrides(first["change"]["layers"]).to_dict()
    x = torch.from_numpy(samples("calibration").x)
    cured = source_of(trained("efficient_kan"), x, samples("test").pair, recipe)
    assert cured.validation.compiled.sqnr_db == pytest.approx(first["effect"]["after"]["sqnr_db"], abs=0.01)
    assert first["effect"]["measured_db"] > 3


@pytest.mark.needs("matplotlib")
def test_the_page_says_what_was_found_and_what_to_change() -> None:
    found = report("weight bits")
    first = found["diagnosis"]["causes"][0]
    text = Text(render(found)).sections["diagnosis"]
    assert "Why it is not better" in text
    assert first["title"] in text
    assert first["change"]["text"] in text
    assert f"{first['effect']['measured_db']:+.1f} dB" in text
    assert f"{first['effect']['predicted_db']:+.1f} dB" in text
    for layer in found["diagnosis"]["layers"]:
        assert f"{layer['dead_columns']:,} of {layer['columns']:,}" in text
    for entry in found["diagnosis"]["sensitivities"]:
        assert f"{entry['only_sqnr_db']:.1f} dB" in text
    assert '<a href="#diagnosis">' in render(found)


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_a_healthy_model_is_said_to_be_healthy() -> None:
    found = report("none")
    jsonschema.validate(json.loads(json.dumps(found, allow_nan=False)), report_schema())
    assert found["diagnosis"]["healthy"]
    assert "Nothing stands out. " in Text(render(found)).sections["diagnosis"]


@pytest.mark.needs("matplotlib")
def test_without_a_diagnosis_there_is_no_section() -> None:
    plain = report("none") | {"diagnosis": None}
    assert "diagnosis" not in Text(render(plain)).sections
    jsonschema.validate(plain, report_schema())


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_dead_columns_are_noted() -> None:
    x = make_inputs(120)
    x[:, :5] = 0.25  # five of six inputs never change
    found = collect(source_of(make_model(), x, make_inputs(40, seed=1)), DIAGNOSED)
    (layer,) = [entry for entry in found["diagnosis"]["layers"] if entry["layer"] == "layers.0"]
    assert layer["dead_columns"] >= 5 * 9  # 8 splines and SiLU of each
    text = Text(render(found)).sections["diagnosis"]
    assert f"{layer['dead_columns']:,} of {layer['columns']:,}" in text
    assert "do not change on the calibration data" in text
    (said,) = [entry for entry in found["layers"] if entry["name"] == "layers.0"]
    assert layer["dead_columns"] == sum(branch["dead"]["either"] for branch in said["branches"])  # one definition


@pytest.mark.needs("matplotlib")
def test_names_are_escaped() -> None:
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    found = copy.deepcopy(report("weight bits"))
    diagnosis = found["diagnosis"]
    diagnosis["judged_on"] = hostile
    diagnosis["notes"] = [hostile]
    diagnosis["layers"][0]["layer"] = diagnosis["sensitivities"][0]["layer"] = hostile
    diagnosis["sensitivities"][-1]["branch"] = hostile
    for cause in diagnosis["causes"]:
        cause |= {"title": hostile, "kind": hostile, "layers": [hostile]}
        cause["change"] |= {"advice": hostile, "text": f"{hostile}; {hostile}"}
    assert not {"script", "img"} & Text(render(found)).tags


@pytest.mark.needs("node", "chromium", "playwright-core", "matplotlib")
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "dark")])
def test_the_section_fits_a_phone(tmp_path: Path, width: int, scheme: str) -> None:
    found = copy.deepcopy(report("weight bits"))
    found["diagnosis"]["causes"][0]["title"] = "a_module.with_a_very_long_name.that_nothing_breaks." * 3
    path = tmp_path / "report.html"
    path.write_text(render(found))
    seen = opened(path, width, scheme)
    assert seen["overflow"] <= 0
    assert seen["scrolls"]
    assert seen["errors"] == []
    assert seen["sections"][:2] == ["findings", "diagnosis"]


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = make_model(), make_inputs(100)
    save_file(model.state_dict(), tmp_path / "kan.safetensors")
    np.savez(tmp_path / "train.npz", x=x.numpy())
    named = [FACTORY, "--factory-arg", FACTORY_ARGS, "--checkpoint", str(tmp_path / "kan.safetensors")]
    data, out = ["--calibration", str(tmp_path / "train.npz")], tmp_path / "built"
    build = ["compile", *named, *data, "--out", str(out), "--layer", "layers.0", "weight_bits=2"]
    assert main([*build, "--diagnose"]) == 2
    assert "--diagnose: found no --report" in capsys.readouterr().err
    assert main([*build, "--report", "--diagnose"]) == 0
    assert "diagnosis: weight bits: " in capsys.readouterr().out
    compiled = json.loads((out / "model.report.json").read_text())["diagnosis"]
    again = ["report", str(out / "model.onnx"), "--against", *named, *data, "--no-sweep", "--no-latency", "--force"]
    assert main([*again, "--diagnose"]) == 0
    assert "diagnosis: weight bits: " in capsys.readouterr().out
    reported = json.loads((out / "model.report.json").read_text())["diagnosis"]
    # the compilation and the file are diagnosed alike
    assert [cause["change"] for cause in reported["causes"]] == [cause["change"] for cause in compiled["causes"]]
    assert reported["outcome"] == compiled["outcome"]
