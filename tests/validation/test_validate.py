"""Validation: every measure against an independent oracle, the runtime against the simulation, the gates."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, jaccard_score, r2_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Contraction, IntegerContraction, Program, TableExpansion
from kancompile.runtimes.session import RuntimeModel, run_reference, run_unfused
from kancompile.validation.error_measures import ErrorMeasure, decibel
from kancompile.validation.paired_decisions import PairedDecisions
from kancompile.validation.task_metrics import TaskMetric
from kancompile.validation.validate import validate
from tests.compiled_kan import N_IN, N_OUT, compiled_kan, make_inputs, make_model


def _file(weight: np.ndarray, batch: int | str = "batch") -> bytes:
    """Write ``y = x @ weight`` as ONNX."""
    n_in, n_out = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["output"])],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, n_in])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, n_out])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def _linear(weight: np.ndarray) -> nn.Module:
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    layer.weight.data = torch.from_numpy(weight.T.astype(np.float32).copy())
    return layer


WEIGHT = np.random.default_rng(0).normal(size=(4, 3))
OTHER = WEIGHT + np.random.default_rng(1).normal(size=(4, 3)) * 0.05
X = np.random.default_rng(2).normal(size=(37, 4)).astype(np.float32)
Y = (X @ WEIGHT).astype(np.float32)
Y_OTHER = (X @ OTHER).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 30), cuts=st.lists(st.integers(1, 29), max_size=4))
def test_error_measure_equals_numpy_however_the_batches_are_cut(seed: int, n: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(n, 4)) * [1, 10, 0.1, 1] + [0, 1000, 3, -5]).astype(np.float32)
    output = (reference + rng.normal(size=(n, 4)) * 0.01).astype(np.float32)
    measure = ErrorMeasure()
    edges = [0, *sorted({cut for cut in cuts if cut < n}), n]
    for start, end in itertools.pairwise(edges):
        measure.add(torch.from_numpy(reference[start:end]), torch.from_numpy(output[start:end]), "test")
    error = output.astype(np.float64) - reference.astype(np.float64)
    spread = ((reference - reference.astype(np.float64).mean(0)) ** 2).sum(0)
    if n > 1:
        ratios = 10 * np.log10(spread / (error**2).sum(0))
        assert measure.sqnr_db == pytest.approx(10 * np.log10(spread.sum() / (error**2).sum()), abs=1e-6)
        assert [measure.output(j).sqnr_db for j in range(4)] == pytest.approx(ratios, abs=1e-6)
        assert measure.worst is not None
        assert measure.worst.output == ratios.argmin()
        assert measure.worst.rms_share == pytest.approx(
            (np.sqrt((error**2).sum(0) / spread))[ratios.argmin()], rel=1e-6
        )
        worst = reference[:, ratios.argmin()].astype(np.float64)
        assert measure.worst.range == pytest.approx(np.ptp(worst))
        assert measure.worst_db == pytest.approx(ratios.min(), abs=1e-6)
    assert measure.largest == pytest.approx(np.abs(error).max(), rel=1e-12)
    assert measure.mean_abs == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert measure.agreement == pytest.approx(100 * (reference.argmax(1) == output.argmax(1)).mean())
    assert measure.differing == (reference != output).sum()


def test_a_constant_part_is_no_signal() -> None:
    """An output of 1000 +- 1 that is off by 1 has lost everything; one that does not vary is judged by its value."""
    rng = np.random.default_rng(0)
    reference = torch.from_numpy(np.stack([1000 + rng.normal(size=500), np.full(500, 1000.0), np.zeros(500)], 1))
    output = reference + torch.from_numpy(np.stack([rng.normal(size=500), np.full(500, 1.0), np.full(500, 0.1)], 1))
    measure = ErrorMeasure()
    measure.add(reference, output, "test")
    errors = [measure.output(j) for j in range(3)]
    assert errors[0].sqnr_db == pytest.approx(0, abs=1)
    assert not errors[0].is_constant
    assert errors[1].is_constant
    assert errors[1].sqnr_db == pytest.approx(60)
    assert errors[1].text() == "constant at 1000, off by 1"
    assert errors[2].is_constant
    assert errors[2].sqnr_db == pytest.approx(20, abs=0.5)  # beside the spread of 1 of the first
    assert measure.worst == errors[0]


@pytest.mark.parametrize(
    ("shape", "outputs"), [((7,), 1), ((7, 3), 3), ((7, 5, 3), 3), ((7, 3, 4, 4), 3), ((7, 3, 2, 2, 2), 3)]
)
def test_what_an_output_is_depends_on_the_shape(shape: tuple[int, ...], outputs: int) -> None:
    reference = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    measure = ErrorMeasure()
    measure.add(reference, reference, "test")
    assert measure.n_outputs == outputs
    assert measure.count == reference.numel()
    assert measure.worst_db == math.inf


def test_decibel_of_extremes() -> None:
    assert decibel(1, 0) == math.inf
    assert decibel(0, 1) == -math.inf
    assert decibel(100, 1) == pytest.approx(20)
    assert math.isnan(decibel(math.nan, 1))
    assert math.isnan(decibel(1, math.nan))


def test_accuracy_equals_scikit_learn() -> None:
    labels = torch.arange(37) % 3
    for shaped in (labels, labels[:, None]):
        metric = TaskMetric()
        for start in range(0, 37, 10):
            metric.add(shaped[start : start + 10], torch.from_numpy(Y[start : start + 10]), "test")
        assert metric.values() == {"accuracy": pytest.approx(100 * accuracy_score(labels, Y.argmax(1)))}


@pytest.mark.parametrize("columns", [1, 3])
def test_r2_and_rmse_equal_scikit_learn_far_from_zero(columns: int) -> None:
    targets = torch.from_numpy((1e4 + Y[:, :columns] * np.array([1, 50, 0.2])[:columns]).astype(np.float32))
    predicted = targets + torch.from_numpy(Y_OTHER - Y)[:, :columns]
    metric = TaskMetric()
    shaped = targets[:, 0] if columns == 1 else targets
    for start in range(0, 37, 10):
        metric.add(shaped[start : start + 10], predicted[start : start + 10], "test")
    difference = targets.double() - predicted.double()
    assert metric.values()["r2"] == pytest.approx(r2_score(targets.double(), predicted.double()), rel=1e-9)
    assert metric.values()["rmse"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-12)


def test_r2_of_a_constant_target_has_no_value() -> None:
    metric = TaskMetric()
    metric.add(torch.ones(5), torch.rand(5, 1, generator=torch.Generator().manual_seed(0)), "test")
    assert list(metric.values()) == ["rmse"]
    assert metric.score is None
    with pytest.raises(KanCompileError, match="labels that do not vary"):
        validate(_file(WEIGHT), _linear(WEIGHT), X, np.full_like(Y, 2.5), max_drop=1)


def test_r2_is_pooled_where_some_targets_do_not_vary() -> None:
    """The mean over outputs would divide by nothing; a pooled R2 is one of all elements about their own means."""
    targets = torch.from_numpy(Y.copy())
    targets[:, 1] = 7.5
    predicted = targets + 0.1
    metric = TaskMetric()
    metric.add(targets, predicted, "test")
    centered = targets.double() - targets.double().mean(0)
    expected = 1 - float((targets.double() - predicted.double()).square().sum() / centered.square().sum())
    assert metric.values()["r2"] == pytest.approx(expected, rel=1e-9)


def test_masks_are_measured_by_their_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(20, 1, 8, 8, generator=generator) > 0.7).float()
    logits = (labels - 0.5) * 4 + torch.randn(20, 1, 8, 8, generator=generator) * 2
    for output, found in ((logits, logits > 0), (torch.sigmoid(logits), logits > 0)):
        metric = TaskMetric()
        for start in range(0, 20, 7):
            metric.add(labels[start : start + 7], output[start : start + 7], "test")
        flat, wanted = found.numpy().ravel(), labels.numpy().ravel() > 0.5
        assert metric.values()["iou"] == pytest.approx(100 * jaccard_score(wanted, flat))
        assert metric.values()["accuracy"] == pytest.approx(100 * accuracy_score(wanted, flat))


def test_labels_with_a_single_one_a_row_are_classes() -> None:
    metric, numbered = TaskMetric(), TaskMetric()
    classes = torch.arange(37) % 3
    for start in range(0, 37, 10):
        part = slice(start, start + 10)
        metric.add(torch.eye(3)[classes[part]], torch.from_numpy(Y[part]), "test")
        numbered.add(classes[part].float(), torch.from_numpy(Y[part]), "test")  # whole numbers as floats
    assert (
        metric.values() == numbered.values() == {"accuracy": pytest.approx(100 * accuracy_score(classes, Y.argmax(1)))}
    )
    assert metric.notes == ("labels: a single one in every row, read as the numbers of 3 classes",)
    assert not numbered.notes
    assert "read as the numbers of 3 classes" in validate(_file(WEIGHT), _linear(WEIGHT), X, np.eye(3)[classes]).table()


@pytest.mark.parametrize("classes_first", [True, False])
def test_a_class_for_every_pixel_or_token(classes_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, 4, generator=generator)  # three dimensions: images of one row, or tokens
    labels = torch.randint(0, 5 if classes_first else 4, (6, 4) if classes_first else (6, 5), generator=generator)
    metric = TaskMetric()
    metric.add(labels, scores, "test")
    chosen = scores.argmax(1) if classes_first else scores.argmax(2)
    assert metric.values()["accuracy"] == pytest.approx(100 * float((chosen == labels).float().mean()))


def test_one_output_decides_between_two_classes() -> None:
    labels = (torch.from_numpy(Y[:, 0]) > 0.2).long()
    for output in (torch.from_numpy(Y[:, :1]), torch.sigmoid(torch.from_numpy(Y[:, :1]))):
        metric = TaskMetric()
        metric.add(labels, output, "test")
        expected = 100 * float(((torch.from_numpy(Y[:, 0]) > 0).long() == labels).float().mean())
        assert metric.values() == {"accuracy": pytest.approx(expected)}


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (3, 9), (40, 22)])
def test_paired_decisions_equal_scipy(lost: int, won: int) -> None:
    n = 400
    first = torch.ones(n, dtype=torch.bool)
    first[:won] = False
    second = ~first
    second[won:] = True
    second[n - lost :] = False
    paired = PairedDecisions.of(first, second)
    assert (paired.lost, paired.won, paired.n) == (lost, won, n)
    assert paired.loss == pytest.approx(100 * (lost - won) / n)
    assert paired.p_value == pytest.approx(binomtest(lost, lost + won).pvalue if lost + won else 1)
    right = int(second.sum())
    exact = binomtest(right, n).proportion_ci(method="exact")
    assert paired.accuracy_interval == pytest.approx((100 * exact.low, 100 * exact.high))
    low, high = paired.interval
    assert low <= paired.loss <= high
    assert paired.is_within_chance == (low <= 0 <= high)
    # the chance that none of n samples shows a loss of this size is one in twenty
    assert (1 - paired.smallest_visible / 100) ** n == pytest.approx(0.05)


def test_intervals_of_a_loss_hold_it_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth = {"lost": 0.03, "won": 0.01}
    counts = rng.multinomial(500, [truth["lost"], truth["won"], 0.96], size=2000)
    held = [
        low <= 2 <= high
        for lost, won, _ in counts.tolist()
        for low, high in [PairedDecisions(500, 480, lost, won).interval]
    ]
    assert 0.94 < np.mean(held) < 0.98


def test_validation_measures_the_real_runtime_against_the_float_model() -> None:
    result = validate(_file(OTHER), _linear(WEIGHT), X, torch.from_numpy(Y.argmax(1)), batch_size=10)
    centered = Y.astype(np.float64) - Y.astype(np.float64).mean(0)
    signal, noise = (centered**2).sum(), ((Y_OTHER.astype(np.float64) - Y) ** 2).sum()
    assert result.compiled.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
    assert result.n_samples == 37
    assert result.metrics["float"]["accuracy"] == 100
    expected = 100 * (Y.argmax(1) == Y_OTHER.argmax(1)).mean()
    assert result.metrics["compiled"]["accuracy"] == pytest.approx(expected)
    assert result.compiled.agreement == pytest.approx(expected)
    assert result.drop == pytest.approx(100 - expected)


def _sources(folder: Path) -> dict[str, Any]:
    labels = Y.argmax(1)
    np.savez(folder / "d.npz", x=X, y=labels)
    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(labels)), batch_size=8)

    def generated() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 37, 5):
            yield torch.from_numpy(X[start : start + 5]), torch.from_numpy(labels[start : start + 5])

    return {"pair": (X, labels), "file": folder / "d.npz", "loader": loader, "generator": generated()}


@pytest.mark.parametrize("form", ["pair", "file", "loader", "generator"])
def test_the_result_does_not_depend_on_form_and_batches_of_the_data(form: str, tmp_path: Path) -> None:
    expected = validate(_file(OTHER), _linear(WEIGHT), X, Y.argmax(1), batch_size=37)
    found = validate(_file(OTHER), _linear(WEIGHT), _sources(tmp_path)[form], batch_size=6)
    assert found.compiled.sqnr_db == pytest.approx(expected.compiled.sqnr_db, abs=1e-4)  # matmul order may differ
    assert found.metrics == expected.metrics
    assert found.n_samples == 37


def test_gates_pass_and_fail() -> None:
    labels = torch.from_numpy(Y.argmax(1))
    good = validate(_file(WEIGHT), _linear(WEIGHT), X, labels, min_sqnr=100, max_drop=0, min_agreement=100)
    assert good.passed, good.reasons
    bad = validate(_file(-WEIGHT), _linear(WEIGHT), X, labels, min_sqnr=0, max_drop=1, min_agreement=99)
    assert not bad.passed
    assert [reason.split()[0] for reason in bad.reasons] == ["SQNR", "accuracy", "top-1"]
    assert "not passed: SQNR of output " in bad.table()
    assert " dB about its mean, wanted at least 0" in bad.table()


def test_nan_and_infinity_pass_no_gate() -> None:
    broken = WEIGHT.copy()
    broken[0, 0] = np.nan
    result = validate(_file(broken), _linear(WEIGHT), X, min_sqnr=-1000)
    assert result.reasons[0] == "37 compiled outputs are NaN or infinite"
    assert "SQNR of output 0 is nan" in result.reasons[1]
    assert not validate(_file(broken), _linear(WEIGHT), X).passed  # even without a gate
    broken[0, 0] = np.inf
    assert not validate(_file(broken), _linear(broken), X).passed  # even where the float model does the same


def test_results_are_valid_json_and_a_readable_table() -> None:
    broken = WEIGHT.copy()
    broken[0, 0] = np.nan
    for weight in (WEIGHT, OTHER, broken):
        result = validate(_file(weight), _linear(WEIGHT), X, Y.argmax(1))
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain["n_samples"] == 37
        assert "ONNX Runtime" in result.table()


def test_the_reference_keeps_its_mode() -> None:
    model = nn.Sequential(_linear(WEIGHT), nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validate(_file(WEIGHT), model, X)
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: validate("absent.onnx", _linear(WEIGHT), X), "model 'absent.onnx': cannot be read"),
        (lambda: validate(b"not onnx", _linear(WEIGHT), X), "cannot load it"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), X[:, :3]), r"samples of shape \(3,\), expected \(4,\)"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT[:, :2]), X), r"output shape \(37, 3\), expected \(37, 2\)"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT[:3]), X), "reference: raised RuntimeError"),
        (lambda: validate(_file(WEIGHT), lambda x: (x, x), X), "found the outputs .'output'., expected .'output_0', 'output_1'."),
        (lambda: validate(_file(WEIGHT), 3, X), "reference: found int"),  # type: ignore[arg-type]
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), X, max_drop=1), "without labels, expected .*folder.*loader of"),
        (lambda: validate(_file(WEIGHT[:, :1]), _linear(WEIGHT[:, :1]), X, min_agreement=1), "no class scores"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), X, np.full(37, 3)), r"classes 3 ... 3, expected 0 ... 2"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), X, np.zeros((37, 2))), "2 values a sample, expected 3"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), X, np.zeros(5)), "expected 37 labels"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), []), "found no samples"),
        (lambda: validate(_file(WEIGHT), _linear(WEIGHT), [X], np.zeros(37)), "beside an iterable of batches"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(call: Any, text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        call()


@pytest.mark.parametrize("levels", [64, 256, 1000])
def test_the_simulation_equals_the_runtime_bit_for_bit_and_layers_are_measured(levels: int) -> None:
    compiled = compiled_kan(levels)
    x = make_inputs(200, seed=9)
    result = validate(
        compiled.model_bytes, compiled.reference, x, program=compiled.program, float_program=compiled.captured
    )
    assert result.runtime is not None
    assert result.runtime.differing == 0
    assert result.runtime.count == 200 * N_OUT
    assert result.simulated is not None
    assert result.simulated.sqnr_db == result.compiled.sqnr_db
    assert len(result.layers) == 2
    # the last contraction is the output; captured and original float models differ by float32 rounding only
    assert result.layers[-1].sqnr_db == pytest.approx(result.compiled.sqnr_db, abs=0.01)
    # row numbers and scaled values read as if they were outputs would be far below 0 dB
    assert result.layers[0].sqnr_db > 20


def test_layers_of_another_model_are_refused() -> None:
    compiled = compiled_kan(256)
    other = _renamed(compiled.captured)
    with pytest.raises(KanCompileError, match="found float_program without program"):
        validate(compiled.model_bytes, compiled.reference, make_inputs(), float_program=compiled.captured)
    with pytest.raises(KanCompileError, match="in the lowered program, expected"):
        validate(compiled.model_bytes, compiled.reference, make_inputs(), program=compiled.program, float_program=other)


def _renamed(program: Program) -> Program:
    layer = program.layers()[0]
    old = program.module(layer.contraction)
    assert isinstance(old, Contraction)
    return program.replace_modules({layer.contraction: old.replace(layer="else")})


def test_unfused_and_reference_runs_agree_with_the_fused_one() -> None:
    """Float arithmetic between layers may move a row number that sits on a rounding edge by one, and nothing else."""
    compiled = compiled_kan(256)
    x = make_inputs(64, seed=3)
    fused = RuntimeModel(compiled.model_bytes)(x)
    bound = _effect_of_one_row(compiled.program) + 1e-5 * float(fused.abs().max())
    for run in (run_unfused, run_reference):
        assert bool(((run(compiled.model_bytes, x) - fused).abs() <= bound).all())
    assert not torch.equal(fused, make_model()(x))


def _effect_of_one_row(program: Program) -> Tensor:
    """Bound what the outputs move when every input of the last layer reads a neighbouring row of its table."""
    layer = program.layers()[-1]
    table, contraction = program.module(layer.expansions[0]), program.module(layer.contraction)
    assert isinstance(table, TableExpansion)
    assert isinstance(contraction, IntegerContraction)
    assert table.n_tables == 1
    rows = table.table.double()
    weight = contraction.weights[0].double().reshape(table.n_in, table.k, -1)
    effect = torch.einsum("rk,iko->rio", rows[1:] - rows[:-1], weight).abs().amax(0).sum(0)
    return effect * contraction.scales[0].double()


def test_a_runtime_model_takes_several_inputs_by_name() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, N_IN]) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [None, N_IN])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    loaded = RuntimeModel(model.SerializeToString())
    inputs = {"b": np.ones((2, N_IN), np.float32), "a": np.full((2, N_IN), 2, np.float32)}
    assert np.array_equal(loaded.run(inputs)[0], np.full((2, N_IN), 3, np.float32))
    with pytest.raises(KanCompileError, match="found the inputs 'of one array', expected"):
        loaded.run(inputs["a"])
    with pytest.raises(KanCompileError, match="found the inputs \\['a', 'b'\\], expected one for this"):
        _ = loaded.input_shape


def test_a_file_of_one_batch_size_is_given_all_samples() -> None:
    result = validate(_file(WEIGHT, batch=5), _linear(WEIGHT), X)  # 37 samples: the last batch is filled up
    assert result.n_samples == len(X)
    assert result.passed
    assert result.compiled.sqnr_db > 100
