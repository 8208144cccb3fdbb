"""Reports: figures against independent computations, the schema, and pages that open anywhere."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from examples.zoo import efficient_kan, spline_conv, wav_kan
from kancompile.cli.main import main
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import TableExpansion
from kancompile.passes.lowering import lower
from kancompile.reporting.facts.bit_front import measure_front
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.facts.source import ReportSource
from kancompile.reporting.render.html import render
from kancompile.reporting.render.node_data import node_data
from kancompile.reporting.render.paper_figures import figure_names, report_figures
from kancompile.reporting.schema import report_schema
from kancompile.validation import EdgeName, LayerPair, evaluate_edges, observe, parse_edge
from tests.compiled_kan import FACTORY, FACTORY_ARGS, make_inputs, make_model
from tests.reporting.report_sources import opened, source_of

FAST = ReportOptions(edge_count=4, sweep=False, float_export=False)


@lru_cache
def labelled() -> ReportSource:
    model, test = make_model(), make_inputs(60, seed=1)
    return source_of(model, make_inputs(), (test, model(test).argmax(1)), {"layers": {"*.0": {"weight_bits": 3}}})


@lru_cache
def labelled_report() -> dict[str, Any]:
    return collect(labelled(), ReportOptions(edge_count=4, latency=False))


def pairs_of(source: ReportSource) -> list[LayerPair]:
    return [LayerPair(source.captured, source.program, number) for number in range(len(source.captured.layers()))]


def unlabelled(kind: str) -> ReportSource:
    generator = torch.Generator().manual_seed(3)
    if kind == "convolution":
        x = torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1
        return source_of(spline_conv.build((3, 4, 5), (1, 2), 4), x, x[:20])
    x = torch.rand(80, 6, generator=generator) * 2 - 1
    if kind == "edges with functions of their own":
        return source_of(wav_kan.build((6, 5, 3)), x, x[:20])
    recipes: dict[str, dict[str, Any]] = {
        "16 bit and float": {"precision": "int16", "layers": {"*.1": {"precision": "float"}}},
        "branches apart": {"granularity": "branch", "weight_bits": 4},
        "allocated bits": {"bits_average": 4},
    }
    return source_of(efficient_kan.build((6, 5, 3)), x, x[:20], recipes[kind])


KINDS = ["convolution", "edges with functions of their own", "16 bit and float", "branches apart", "allocated bits"]


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_program_is_reported_without_labels(kind: str) -> None:
    report = collect(unlabelled(kind), replace(FAST, sweep=kind == "allocated bits"))
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), report_schema())
    assert report["summary"]["task"] is None
    assert all(layer["alone"] is not None for layer in report["layers"])
    assert report["edges"]
    # curves lie on the float ones as closely as the layer's own weights allow; a wrong column or unit gives about 0 dB
    floor = 80 if kind == "16 bit and float" else 15
    for edge in report["edges"]:
        assert not isinstance(edge["sqnr_db"], float) or edge["sqnr_db"] > floor
    page = render(report)
    assert page.count("<svg") == len(report["edges"]) + len(_maps(report)) + bool(report["bit_front"]["points"])
    if kind == "allocated bits":
        assert report["bit_front"]["origin"] == "bit allocation"
        assert sum(point["shipped"] for point in report["bit_front"]["points"]) == 1


def _maps(report: dict[str, Any]) -> list[Any]:
    return [layer for layer in report["layers"] if layer["weight_errors"] is not None]


def test_data_fit_the_schema_and_say_what_validation_measured() -> None:
    report, source = labelled_report(), labelled()
    jsonschema.Draft202012Validator.check_schema(report_schema())
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), report_schema())
    assert report["summary"]["sqnr_db"] == source.validation.compiled.sqnr_db
    assert report["summary"]["runtime"]["differing"] == 0
    assert [layer["weight_bits"] for layer in report["layers"]] == [3, 8]
    assert report["summary"]["task"]["name"] == "accuracy"
    assert [layer["kernels"][0]["operator"] for layer in report["layers"]] == ["QGemm", "QGemm"]
    broken = report | {"surprise": 1}
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(broken, report_schema())


def test_the_front_compares_with_float_on_the_same_samples() -> None:
    source = labelled()
    x, labels = source.judging.samples, source.judging.labels
    assert labels is not None
    front = measure_front(source)
    assert front["samples"] == len(x)
    assert front["float_metric"] == pytest.approx(100 * float((source.captured(x).argmax(1) == labels).float().mean()))
    shipped = next(point for point in front["points"] if point["shipped"])
    assert shipped["metric"] == pytest.approx(100 * float((source.program(x).argmax(1) == labels).float().mean()))


def test_a_layer_alone_brings_what_it_brings_when_lowered_alone() -> None:
    source, report = labelled(), labelled_report()
    x = source.judging.samples
    expected = source.captured(x).double()
    noises = []
    for layer in report["layers"]:
        others = {n["name"]: {"lowering": "keep"} for n in report["layers"] if n["name"] != layer["name"]}
        program = lower(source.captured, source.calibration.samples, source.recipe.with_overrides(others), source.seed)
        noise = (program(x).double() - expected).square().sum()
        noises.append(float(noise))
        sqnr = 10 * torch.log10((expected - expected.mean(0)).square().sum() / noise)
        assert layer["alone"]["sqnr_db"] == pytest.approx(float(sqnr), abs=0.1)
    for layer, noise in zip(report["layers"], noises, strict=True):
        assert layer["alone"]["noise_share"] == pytest.approx(noise / sum(noises), rel=0.03)


def test_branches_alone_add_up_to_their_layer() -> None:
    for pair in pairs_of(labelled()):
        x = labelled().captured.inputs(make_inputs(40, seed=2), [pair.float_layer.expansions[0]])
        features = pair.features({pair.float_layer.expansions[0]: x[pair.float_layer.expansions[0]]})
        whole = pair.output(features).double()
        parts = torch.stack([pair.part(features, name).double() for name in pair.branch_names]).sum(0)
        assert len(pair.branch_names) == 2
        torch.testing.assert_close(parts - parts.mean(0), whole - whole.mean(0), rtol=1e-4, atol=1e-5)


def test_curves_are_those_of_the_model_and_of_the_file() -> None:
    source = labelled()
    seen = observe(source.captured, pairs_of(source), source.calibration.samples)
    pair = pairs_of(source)[0]
    name = EdgeName(pair.name, pair.float_layer.expansions[0], 2, 4)
    (edge,) = evaluate_edges(pair, [name], seen)
    points = torch.zeros(len(edge.x), 6)
    points[:, 4] = edge.x
    first = make_model().get_submodule("layers.0")
    with torch.no_grad():
        y = first(points)[:, 2].double()
    torch.testing.assert_close(edge.exact - edge.exact[0], y - y[0], rtol=1e-3, atol=1e-5)
    # the file's arithmetic: everything else constant, only this input moves
    output = pair.output(pair.features({pair.float_layer.expansions[0]: points}))[:, 2].double()
    torch.testing.assert_close(edge.compiled - edge.compiled[0], output - output[0], rtol=1e-3, atol=1e-5)
    assert edge.table is not None
    # float weights on the table are nearer than 3-bit weights; beyond the table both stay where it ends
    inside = (edge.x > -1.1) & (edge.x < 1.1)
    errors = [float((curve - edge.exact)[inside].square().mean()) for curve in (edge.table, edge.compiled)]
    assert errors[0] < errors[1] / 2
    assert int(edge.counts.sum()) == len(seen.inputs[name.expansion])


def test_inputs_outside_a_table_are_counted() -> None:
    source = source_of(
        make_model(), make_inputs(), make_inputs(20, seed=1), {"range": "percentile", "percentile": 90.0}
    )
    pairs = pairs_of(source)
    report = collect(source, FAST)
    table = source.program.module(pairs[0].layer.expansions[0])
    assert isinstance(table, TableExpansion)
    x = source.calibration.inputs
    half = table.index.scale / 2
    below, above = int((x < table.index.low - half).sum()), int((x > table.index.high + half).sum())
    outside = report["layers"][0]["expansions"][0]["outside"]
    assert (outside["below"], outside["above"], outside["count"]) == (below, above, x.size)
    assert below + above > 0.02 * x.size
    assert any(f["where"] == pairs[0].name and "outside its table" in f["text"] for f in report["findings"])


def test_dead_columns_are_counted() -> None:
    x = make_inputs()
    x[:, 3] = 0.25  # an input that never changes has 9 functions that never change
    model = make_model()
    with torch.no_grad():
        model.get_submodule("layers.0").base_weight[:, 1] = 0.0  # and a base function that nothing reads
    source = source_of(model, x, x[:20])
    layer = collect(source, FAST)["layers"][0]
    dead = {branch["meaning"]: branch["dead"] for branch in layer["branches"]}
    assert dead["SiLU"]["constant"] == 1
    assert dead["SiLU"]["zero_weights"] == 1
    assert dead["SiLU"]["either"] == 2
    assert dead["spline of 8 functions"]["constant"] >= 8


@pytest.mark.needs("matplotlib")
def test_figures_stand_in_files_of_their_own() -> None:
    report = labelled_report()
    files = report_figures(report, ["svg"])
    assert sorted(files) == ["edges.svg", "front.svg", "layers.svg", "weights.svg"]
    assert set(files) <= set(figure_names())
    assert "accuracy in %" in files["front.svg"].decode()
    assert all(layer["name"] in files["layers.svg"].decode() for layer in report["layers"])
    for point in report["bit_front"]["points"]:
        low, high = point["interval"]
        assert low <= point["metric"] <= high


def test_node_data_name_every_node_of_a_layer() -> None:
    source, report = labelled(), labelled_report()
    found = node_data(report, source.session_bytes)
    nodes = onnx.load_model_from_string(source.session_bytes).graph.node
    products = {node.output[0]: node.name.split("/")[0] for node in nodes if node.op_type == "Gemm"}
    ratios = {layer["name"]: layer["sqnr_db"] for layer in report["layers"]}
    assert len(products) == 2
    for tensor, name in products.items():
        assert found["results"][tensor]["value"] == pytest.approx(ratios[name], abs=0.01)
    assert set(found["results"]) <= {output for node in nodes for output in node.output}
    assert [entry["stop"] for entry in found["gradient"]] == [0, 1]


def test_integer_sums_stay_below_their_bound() -> None:
    source, report = labelled(), labelled_report()
    pair = pairs_of(source)[0]
    contraction = pair.contraction
    features = pair.features({pair.float_layer.expansions[0]: make_inputs(500, seed=7) * 3})
    weights = torch.cat(contraction.weights).double()  # type: ignore[union-attr, arg-type]
    sums = features[0].flatten(1).double() @ weights + contraction.bias.double()
    bound = report["layers"][0]["int32_sums"]["largest"]
    assert float(sums.abs().max()) <= bound < 40 * float(sums.abs().max())


def test_fewer_bits_give_larger_weight_errors() -> None:
    layers = labelled_report()["layers"]
    relative = [layer["weight_errors"]["relative"] for layer in layers]
    assert relative[0] > 8 * relative[1]
    values = np.array(layers[0]["weight_errors"]["values"])
    assert values.shape == (5, 6)
    # the mean of squares over edges is that of the layer
    assert np.sqrt((values**2).mean()) == pytest.approx(relative[0], rel=0.01)


@pytest.mark.needs("matplotlib")
def test_equal_measurements_give_equal_bytes() -> None:
    report, again = (collect(labelled(), FAST) for _ in range(2))
    assert json.dumps(again) == json.dumps(report)
    assert render(again) == render(report)


@pytest.mark.needs("matplotlib")
def test_names_are_escaped() -> None:
    hostile = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    report = copy.deepcopy(labelled_report())
    report["model"]["name"] = report["measured_on"] = report["layers"][0]["name"] = hostile
    report["edges"][0]["layer"] = hostile
    report["layers"][1]["branches"][0]["name"] = hostile
    report["findings"] = [{"severity": "note", "where": hostile, "text": hostile}]
    report["unrecognized"] = [{"node": hostile, "operator": hostile, "reason": hostile, "source": hostile}]
    report["pipeline"][0] = {
        "name": hostile,
        "changes": [{"node": hostile, "before": hostile, "after": hostile}],
        "notes": [hostile],
    }
    report["model"]["recipe"]["layers"] = {hostile: {"method": hostile}}
    tags: list[str] = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags.append(tag)

    Collector().feed(render(report))
    assert "script" not in tags
    assert "img" not in tags


def test_edges_are_named_by_layer_or_number() -> None:
    pairs = pairs_of(labelled())
    assert parse_edge("layers.1:2,4", pairs) == parse_edge("1:2,4", pairs)
    report = collect(labelled(), ReportOptions(edges=("1:2,4",), edge_count=0, sweep=False, float_export=False))
    assert [(edge["layer"], edge["output"], edge["input"]) for edge in report["edges"]] == [("layers.1", 2, 4)]
    for text, message in {
        "layers.1": "expected LAYER:OUTPUT,INPUT",
        "nowhere:1,2": "no layer 'nowhere'",
        "0:5,0": r"output is 5, expected 0 \.\.\. 4",
        "0:0,6": r"input is 6, expected 0 \.\.\. 5",
    }.items():
        with pytest.raises(KanCompileError, match=message):
            parse_edge(text, pairs)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    model, x = make_model(), make_inputs(100)
    save_file(model.state_dict(), folder / "kan.safetensors")
    np.savez(folder / "train.npz", x=x.numpy(), y=model(x).argmax(1).numpy())
    np.savez(folder / "other.npz", x=make_inputs(100, seed=9).numpy())
    common = [FACTORY, "--factory-arg", FACTORY_ARGS, "--checkpoint", str(folder / "kan.safetensors"), "--quiet"]
    data = ["--calibration", str(folder / "train.npz"), "--out", str(folder / "built")]
    assert main(["compile", *common, *data, "--report"]) == 0
    return folder


def _report(work: Path, *more: str) -> list[str]:
    model = ["--against", FACTORY, "--factory-arg", FACTORY_ARGS, "--checkpoint", str(work / "kan.safetensors")]
    return ["report", str(work / "built" / "model.onnx"), *model, *more]


@pytest.mark.needs("matplotlib")
def test_compile_writes_the_report_beside_the_model(work: Path) -> None:
    names = sorted(path.name for path in (work / "built").iterdir())
    assert names == ["model.manifest.json", "model.onnx", "model.report.html", "model.report.json"]
    report = json.loads((work / "built" / "model.report.json").read_text())
    jsonschema.validate(report, report_schema())
    assert report["summary"]["latency"][0]["ratio"] > 0
    assert (work / "built" / "model.report.html").stat().st_size < 3_000_000


@pytest.mark.needs("matplotlib")
@pytest.mark.slow
def test_a_file_is_reported_as_its_compilation_was(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.html"
    data = str(work / "train.npz")
    assert (
        main([*_report(work, "--data", data, "--calibration", data), "--out", str(out), "--no-latency", "--no-sweep"])
        == 0
    )
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "% of the error at the output" in printed
    found = json.loads(out.with_suffix(".json").read_text())
    before = json.loads((work / "built" / "model.report.json").read_text())
    assert found["summary"]["runtime"]["differing"] == 0  # the program that was made again is that of the file
    for old, new in zip(before["layers"], found["layers"], strict=True):
        assert old["weight_errors"] == new["weight_errors"]
        assert old["expansions"] == new["expansions"]
    assert found["edges"] == before["edges"]
    assert main([*_report(work, "--data", data), "--out", str(out)]) == 2  # exists


@pytest.mark.needs("matplotlib")
def test_other_calibration_data_are_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    assert main([*_report(work, "--data", str(work / "other.npz")), "--out", str(out)]) == 2
    assert "was compiled with; pass --calibration" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.needs("matplotlib")
def test_missing_matplotlib_is_said_before_any_work(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    command = ["compile", "no.such:model", "--calibration", "nothing.npz", "--out", str(tmp_path / "o"), "--report"]
    assert main(command) == 2
    assert "pip install 'kancompile[plots]'" in capsys.readouterr().err
    assert main(_report(work, "--data", "nothing.npz")) == 2
    assert "pip install 'kancompile[plots]'" in capsys.readouterr().err


@pytest.mark.needs("node", "chromium", "playwright-core", "matplotlib")
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (375, "dark"), (1280, "dark")])
def test_the_page_fits_a_phone_and_needs_no_network(tmp_path: Path, width: int, scheme: str) -> None:
    report = copy.deepcopy(labelled_report())
    report["layers"][0]["name"] = "a_module.with_a_very_long_name.that_nothing_breaks." * 3
    report["findings"] = [{"severity": "warning", "where": "w" * 120, "text": "t" * 200}]
    path = tmp_path / "report.html"
    path.write_text(render(report))
    seen = opened(path, width, scheme)
    assert seen["overflow"] <= 0
    assert seen["scrolls"]
    assert seen["errors"] == []
    assert (seen["foreign"], seen["files"], seen["scripts"]) == (0, 1, 0)
    assert seen["sections"] == ["findings", "layers", "functions", "weights", "bits", "pipeline", "facts"]
    assert all(0 < plot <= width for plot in seen["plots"])
    assert len(seen["plots"]) == len(report["edges"]) + 3
    assert (seen["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
