"""Networks whose layers look inputs up in pairs: compiled, refused, rounded by every method, reported and diagnosed."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.digit_models import build_seeded
from benchmarks.zoo_models import ZOO
from examples.zoo import efficient_kan, fast_kan
from examples.zoo.efficient_kan import KAN
from kancompile import compile, diagnose
from kancompile.compiler import CompiledModel
from kancompile.compiler.ladder import gate_rungs
from kancompile.data import load_calibration
from kancompile.ir import IntegerContraction, JointTable, Program, check, differentiable, quantized, show
from kancompile.passes import LookUpMembers, Lowering
from kancompile.passes.round_weights import prove_layer
from kancompile.recipe import METHODS, read_recipe
from kancompile.reporting.facts import ReportOptions, collect, describe_file, file_table, of_compiled
from kancompile.reporting.render import compile_summary
from kancompile.reporting.render.html import render
from kancompile.reporting.schema import report_schema
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.session import RuntimeModel
from tests.diagnosis.planted_faults import FAMILIES, captured, samples

JOINT: dict[str, Any] = {"lookup": "joint", "function_error": 1e-2}
N_IN = 13


def model() -> nn.Module:
    return KAN([N_IN, 9, 5], torch.Generator().manual_seed(0)).eval()


def drawn(n: int = 400, seed: int = 1, reach: float = 1.2) -> torch.Tensor:
    return (torch.rand(n, N_IN, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def compiled_with(*joint: str, n: int = 400, **keys: Any) -> CompiledModel:
    chosen = {"goal_sqnr": None, "method": "uniform", "layers": dict.fromkeys(joint, JOINT)} | keys
    return compile(model(), drawn(n), recipe=chosen)


@lru_cache
def both() -> CompiledModel:
    """Join an odd number of inputs, and hidden ones whose row numbers are handed over."""
    return compiled_with("layers.0", "layers.1")


@lru_cache
def lowering(family: str = "chebyshev_kan") -> Lowering:
    return Lowering(captured(family), torch.from_numpy(samples("calibration").x))


def lowered(family: str = "chebyshev_kan", **keys: Any) -> Program:
    joint = keys.pop("joint", ("layers.0",))
    return _run(lowering(family), {"method": "uniform", "layers": dict.fromkeys(joint, JOINT)} | keys)


def _run(lowering: Lowering, keys: dict[str, Any]) -> Program:
    names = [layer.name for layer in lowering.program.layers()]
    return lowering(read_recipe(keys).settled(names))


def joint_tables(program: Program) -> list[JointTable]:
    return [table for _, table in program.nodes(JointTable)]


def test_outputs_equal_the_simulation_in_batches_of_any_size() -> None:
    compiled, x = both(), drawn(102, 7, 2.0)
    first, second = joint_tables(compiled.program)
    assert (first.input, second.input) == ("real", "index")
    expected = compiled.program(x).numpy()
    session = RuntimeModel(compiled.model_bytes)
    for batch in (1, 3, 17):
        found = np.concatenate([session.run(part.numpy())[0] for part in x.split(batch)])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.needs("ort-x86-haswell")
def test_processors_that_saturate_give_the_same(tmp_path: Path) -> None:
    compiled, x = both(), drawn(102, 7, 2.0)
    assert all(layer["int16_pairs"]["exact"] for layer in compiled.manifest["layers"])
    file = tmp_path / "model.onnx"
    file.write_bytes(compiled.model_bytes)
    np.testing.assert_array_equal(RUNTIMES["ort-x86-haswell"].run(file, x.numpy()), compiled.program(x).numpy())


def test_without_fused_kernels_rows_differ_by_one_at_most() -> None:
    """The layer in front then computes in float, so that a value between two rows may take the other one."""
    compiled, x = both(), drawn(102, 7)
    expected = compiled.program(x)
    step = step_of_hidden_rows(compiled.program, x)
    for level in ("ORT_ENABLE_BASIC", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(compiled.model_bytes, options, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        differences = (found - expected).abs()
        assert float(differences.max()) <= 2 * step + 1e-6, level
        assert float((differences > 1e-5).any(1).double().mean()) < 0.05, level


def step_of_hidden_rows(program: Program, x: torch.Tensor) -> float:
    """Measure by how much any output changes where one hidden row number is another by one."""
    table = joint_tables(program)[1]
    layer = program.layers()[1]
    contraction = program.node(layer.contraction, IntegerContraction)
    rows = program.trace(x, layer.expansions)[layer.expansions[0]][0][0]
    base = contraction(table(rows))
    steps = []
    for number in range(rows.shape[1]):
        moved = rows.clone()
        moved[:, number] = (rows[:, number].long() + 1).clamp(max=table.index.levels - 1).to(torch.uint8)
        steps.append(float((contraction(table(moved)) - base).abs().max()))
    return max(steps)


def test_equal_inputs_give_equal_bytes() -> None:
    assert compiled_with("layers.0", "layers.1").model_bytes == both().model_bytes


def test_what_is_lost_is_what_the_recipe_allows() -> None:
    compiled, x = both(), drawn(2000, 8)
    exact = captured_layer(compiled.captured, x)
    found = captured_layer(compiled.program, x)
    lost = float((found - exact).square().mean() / exact.var(0, correction=0).mean())
    assert lost < 1.5 * JOINT["function_error"], lost
    said = [note for note in compiled.manifest["notes"] if "of pairs of inputs (" in note]
    assert [note.split(": ")[0] for note in said] == ["layer 'layers.0'", "layer 'layers.1'"]
    assert f"{N_IN * 9} functions replaced by {joint_tables(compiled.program)[0].n_in}" in said[0]


def captured_layer(program: Program, x: torch.Tensor) -> torch.Tensor:
    layer = program.layers()[0]
    contraction = program.contraction(layer)
    features = program.trace(x, layer.expansions)[layer.expansions[0]][1]
    return contraction.handing_real()(features)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("keys", "n", "reason"),
    [
        ({"function_error": 1e-9}, 400, "1024 rows for an input lose more than 1e-09 of the output's variance"),
        (
            {"function_error": 1e-4, "levels": 256},
            400,
            "117 joint functions still lose more than 0.0001 of the output's",
        ),
        ({}, 100, "joint functions take 128 calibration samples or more, found 100"),
        ({"levels": 1024}, 400, "at most 256 rows each, found levels = 1024"),
    ],
)
def test_what_cannot_be_joined_is_looked_up_by_itself_and_says_why(keys: dict[str, Any], n: int, reason: str) -> None:
    program = _run(Lowering(both().captured, drawn(n)), {"method": "uniform", "layers": {"layers.0": JOINT | keys}})
    assert not joint_tables(program)
    (note,) = [note for note in program.notes if "so each input is looked up by itself" in note]
    assert note.startswith("layer 'layers.0': ")
    assert reason in note


def test_weights_make_up_for_functions_that_were_left_out() -> None:
    captured, fresh = both().captured, drawn(500, 5)
    exact, errors = captured(fresh), []
    for drift in ("off", "on"):
        keys = {
            "method": "gptq",
            "weight_bits": 3,
            "drift": drift,
            "layers": dict.fromkeys(("layers.0", "layers.1"), JOINT),
        }
        program = _run(Lowering(captured, drawn(2000)), keys)
        assert len(joint_tables(program)) == 2
        errors.append(float((program(fresh) - exact).square().mean()))
    assert any(
        "'layers.1': weights adjusted to the errors of earlier layers (drift, alpha" in note for note in program.notes
    )
    assert errors[1] < 0.95 * errors[0], errors


def test_a_constant_output_is_not_joined() -> None:
    x = torch.full((200, N_IN), 0.3)
    program = _run(Lowering(both().captured, x), {"method": "uniform", "layers": {"layers.0": JOINT}})
    assert not joint_tables(program)
    assert any("its output is constant over the calibration samples" in note for note in program.notes)


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        *itertools.product(["uniform", "gptq", "awq", "adaround"], [2, 4, 8]),
        pytest.param("brecq", 2, marks=pytest.mark.slow),
    ],
)
def test_every_method_rounds_weights_of_pairs(method: str, bits: int) -> None:
    assert method in METHODS
    program = lowered(joint=("layers.0", "layers.1"), method=method, weight_bits=bits)
    check(program)
    assert len(joint_tables(program)) == 2
    x = torch.from_numpy(samples("test").x)
    exact = captured("chebyshev_kan")(x)
    for table in joint_tables(program):
        assert int(table.parts.long().amax(3).sum(0).max()) <= 255
    sqnr = 10 * torch.log10(exact.var() / (program(x) - exact).square().mean())
    assert float(sqnr) > {2: 2.0, 4: 12.0, 8: 16.0}[bits], sqnr
    for layer in program.layers():
        proof = prove_layer(program, layer)
        assert proof is not None
        assert proof.holds
    back = quantized(differentiable(program, trainable=True))
    assert show(back) == show(program)
    assert torch.equal(back(x), program(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_data_that_calibration_did_not_see_cost_little_more_than_with_single_inputs(family: str) -> None:
    share = 3e-4
    exact, x = captured(family), torch.from_numpy(samples("test").x)
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    joint, single = (
        lowered(family, joint=(), layers={"layers.0": {"lookup": lookup}, "layers.1": {"lookup": "each"}})
        for lookup in ("joint", "each")
    )
    assert joint_tables(joint)
    assert not joint_tables(single)
    for name, seen in {"as calibrated": x, "x 0.7": 0.7 * x, "x 1.2": 1.2 * x, "noise": x + noise}.items():
        expected = exact(seen)
        ours, theirs = (float((p(seen) - expected).square().mean() / expected.var()) for p in (joint, single))
        # what is left out was small for inputs as calibrated; ten times as much is allowed for others
        assert ours <= theirs + 10 * share, (
            f"{name}: {ours:.2g} of the variance lost in pairs, {theirs:.2g} by single inputs"
        )


def test_the_ladder_offers_more_functions_and_single_inputs() -> None:
    chosen = read_recipe({"layers": {"layers.0": JOINT}}).for_layer("layers.0")
    offered = [dict(rung.change) for rung in gate_rungs(chosen, captured("chebyshev_kan"), lowered(), "layers.0")]
    assert {"lookup": "each"} in offered
    assert {"function_error": JOINT["function_error"] / 4} in offered
    assert not any("levels" in keys for keys in offered)


@pytest.mark.slow
def test_a_limit_that_the_functions_kept_miss_is_reached() -> None:
    recipe = {"min_sqnr": 33.0, "method": "uniform", "layers": {"layers.0": JOINT}}
    compiled, x = compile(model(), drawn(), recipe=recipe), drawn()
    exact = compiled.captured(x).double()
    noise = compiled.program(x) - exact
    worst = float((10 * torch.log10(exact.var(0) / noise.var(0))).min())
    assert worst > 32.5, worst


@lru_cache
def report(target: str = "ort-cpu") -> dict[str, Any]:
    compiled, x = compiled_with("layers.0"), drawn(60, 5)
    judging = load_calibration((x, model()(x).argmax(1)))
    result = compiled.validate(judging)
    found = compiled if target == "ort-cpu" else compiled.for_target(target)
    source = of_compiled(found, judging, "60 samples", result, "model")
    return collect(source, ReportOptions(edge_count=2, latency=False, sweep=False, float_export=False))


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("target", ["ort-cpu", "c99"])
def test_reports_say_what_is_looked_up(target: str) -> None:
    found = report(target)
    jsonschema.validate(found, report_schema())
    expansions = found["layers"][0]["expansions"]
    assert {entry["form"] for entry in expansions} == {"table"}
    assert all(entry["outside"]["worst_input"] < N_IN for entry in expansions)
    if target == "ort-cpu":
        assert expansions[0]["inputs_read"] == N_IN
        page = render(found)
        assert f"{N_IN} jointly: {expansions[0]['n_in']} " in page
        assert f"{expansions[0]['n_in']} x 1" not in page
    else:
        notes = [note for step in found["pipeline"] for note in step["notes"]]
        assert sum("'c99' looks up single inputs only" in note for note in notes) == 1
        # parts as bytes of rows, which the ONNX file makes of integers
        assert found["layers"][0]["table_bytes"] > report()["layers"][0]["table_bytes"]


@pytest.mark.parametrize("target", ["ort-cpu", "c99"])
def test_drawn_edges_are_those_of_their_input(target: str) -> None:
    """One function of a pair serves many edges; of each of them it keeps what the recipe allows."""
    edges = [edge for edge in report(target)["edges"] if edge["layer"] == "layers.0"]
    assert edges
    for edge in edges:
        assert edge["table"] is None
        inside = np.abs(np.array(edge["x"])) <= 1
        exact, compiled = (np.array(edge[key])[inside] for key in ("float", "compiled"))
        assert (compiled - exact).var() < 2 * JOINT["function_error"] * exact.var(), (edge["input"], edge["output"])


def test_texts_name_pairs() -> None:
    compiled = both()
    columns = [table.n_in for table in joint_tables(compiled.program)]
    text = file_table(describe_file(compiled.model_bytes))
    assert f"layer layers.0: {N_IN} inputs looked up jointly, {columns[0]} functions" in text
    assert "kancompile 1" not in text.splitlines()[0]
    summary = compile_summary(compiled, compiled.validate(drawn(50)), "50 samples")
    assert f"{N_IN} jointly: {columns[0]}" in summary
    assert f"9 jointly: {columns[1]}" in summary


@pytest.mark.slow
def test_a_diagnosis_names_pairs_and_what_single_look_ups_would_bring() -> None:
    found = diagnose(model(), drawn(), recipe={"method": "uniform", "layers": {"*": JOINT}})
    assert [anatomy.is_joint for anatomy in found.anatomies] == [True, True]
    causes = {cause.layers: cause for cause in found.causes if "few joint functions of inputs" in cause.title}
    assert set(causes) >= {("layers.0",), ("layers.1",)}
    for cause in causes.values():
        assert cause.change is not None
        more = {"function_error": JOINT["function_error"] / 4}
        assert all(keys in ({"lookup": "each"}, more) for keys in cause.change.layers.values())


def test_layers_of_two_expansions_are_joined_and_divided() -> None:
    torch.manual_seed(0)
    network = fast_kan.build((40, 8, 3)).eval()
    x = torch.randn(400, 40, generator=torch.Generator().manual_seed(1))
    recipe = {"goal_sqnr": None, "layers": {"layers.0": {"lookup": "joint", "function_error": 1e-2}}}
    compiled = compile(network, x, recipe=recipe)
    assert len(joint_tables(compiled.program)) == 2
    session = RuntimeModel(compiled.model_bytes)
    np.testing.assert_array_equal(session.run(x.numpy())[0], compiled.program(x).numpy())
    divided = LookUpMembers("c99")(compiled.program)
    check(divided)
    assert torch.equal(divided(x), compiled.program(x))


def test_few_samples_off_the_mean_are_judged_by_their_own_variance() -> None:
    """Inputs that hardly vary together: moved samples vary far more, and must not hide what is lost of the others."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(2, 40, generator=generator)
    x = torch.randn(401, 2, generator=generator) @ mixing * 0.3 + 0.02 * torch.randn(401, 40, generator=generator)
    torch.manual_seed(0)
    network = efficient_kan.build((40, 6)).eval()
    keys = {"lookup": "joint", "function_error": 1e-2}
    compiled = compile(network, x, recipe={"goal_sqnr": None, "layers": {"layers.0": keys}})
    fresh = torch.randn(800, 2, generator=generator) @ mixing * 0.3 + 0.02 * torch.randn(800, 40, generator=generator)
    exact = compiled.captured(fresh)
    lost = float((compiled.program(fresh) - exact).square().mean() / exact.var(0, correction=0).mean())
    assert lost < 2e-2, lost


def test_outputs_in_groups_are_left_alone() -> None:
    (family,) = [family for family in ZOO if family.family == "rational of each group"]
    network, x = build_seeded(family.build), torch.rand(200, 64, generator=torch.Generator().manual_seed(1))
    compiled = compile(network, x, recipe={"goal_sqnr": None, "lookup": "joint"})
    for layer in compiled.program.layers():
        joined = any(isinstance(table, JointTable) for table in compiled.program.tables(layer).values())
        said = [note for note in compiled.manifest["notes"] if note.startswith(f"layer {layer.name!r}: ")]
        assert joined or any("looked up by itself" in note for note in said)
    session = RuntimeModel(compiled.model_bytes)
    np.testing.assert_array_equal(session.run(x.numpy())[0], compiled.program(x).numpy())
