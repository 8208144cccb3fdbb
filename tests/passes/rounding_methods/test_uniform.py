import dataclasses

import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.rounding_methods import METHODS, method_named
from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.awq import Awq
from kancompile.passes.rounding_methods.guard import Guarded, with_guard
from kancompile.passes.rounding_methods.problem import (
    FeatureSource,
    Rounded,
    RoundingProblem,
    column_moments,
    objective,
    second_moments,
)
from kancompile.passes.rounding_methods.uniform import Uniform
from tests.passes.rounding_methods.rounding_problems import generator, problem, table_codes


def quick(name):
    """Return a method of that name that learns for a short time only."""
    method = method_named(name)
    if isinstance(method, AdaRound):
        return dataclasses.replace(method, iterations=30)
    if isinstance(method, Awq) and isinstance(method.inner, AdaRound):
        return dataclasses.replace(method, inner=dataclasses.replace(method.inner, iterations=30))
    return method


def test_every_code_is_the_nearest_one():
    task = problem(bits=4)
    rounded = Uniform()(task, generator())
    real = task.weight / rounded.scale[0][:, None]
    assert torch.equal(rounded.codes.float(), real.round().clamp(-8, 7))


def test_bias_correction_removes_the_mean_error():
    task = problem(bits=2)
    corrected, plain = Uniform()(task, generator()), Uniform(correct_bias=False)(task, generator())
    error = (
        next(iter(FeatureSource.from_tensor(torch.cat(list(task.features)).float(), 10**6)))
        @ (task.weight - corrected.dequantized()).T
    )
    torch.testing.assert_close(corrected.offset, error.mean(0), rtol=1e-4, atol=1e-5)
    # features sit around code 128, so the constant part is most of the error
    assert objective(task, corrected) < 0.5 * objective(task, plain)


def test_objective_equals_trace_of_the_covariance():
    task = problem(bits=3, n=300)
    rounded = Uniform()(task, generator())
    q = torch.cat(list(task.features)).double()
    difference = (task.weight - rounded.dequantized()).double()
    covariance = torch.cov(q.T, correction=0)
    expected = float(torch.trace(difference @ covariance @ difference.T)) / task.n_out
    assert objective(task, rounded) == pytest.approx(expected, rel=1e-4)


def test_objective_counts_a_coarser_table():
    task = problem(bits=8, n=300)
    s = torch.full((task.c,), 1 / 16)
    codes, scale = torch.ones(task.n_out, task.c, dtype=torch.int8), torch.full((1, task.n_out), 0.01)
    rounded = Rounded(codes, scale, torch.zeros(task.n_out), (), task.group_sizes, s)
    q = torch.cat(list(task.features)).float()
    expected = float((q @ task.weight.T - (q / 16).round() @ (codes * scale.T).T).square().mean())
    assert objective(task, rounded) == pytest.approx(expected, rel=1e-4)


def test_moments_do_not_depend_on_chunks_and_find_dead_columns():
    q = table_codes(333, 20, 5, dead=3)
    whole = second_moments(FeatureSource.from_tensor(q, 333), "l")
    parts = second_moments(FeatureSource.from_tensor(q, 50), "l")
    assert whole.live.tolist() == list(range(17)) == parts.live.tolist()
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        whole.covariance.double(), torch.cov(q[:, :17].double().T, correction=0), rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(whole.mean, q.double().mean(0))


def test_dead_columns_keep_their_trained_weights():
    task = problem(bits=4, dead=10)
    for method in (Uniform(), method_named("gptq"), AdaRound(iterations=20)):
        rounded = method(task, generator())
        real = (task.weight / rounded.scale[0][:, None])[:, -10:]
        assert torch.equal(rounded.codes[:, -10:].float(), real.round().clamp(-8, 7))
        assert rounded.codes[:, -10:].any()


def test_guard_keeps_the_better_result_and_says_so():
    task = problem(bits=3)

    @dataclasses.dataclass(frozen=True)
    class Zeros:
        def __call__(self, problem, generator):
            codes = torch.zeros(problem.n_out, problem.c, dtype=torch.int8)
            return Rounded(codes, torch.ones(1, problem.n_out), torch.zeros(problem.n_out), (), problem.group_sizes)

    kept = Guarded(Zeros(), Uniform())(task, generator())
    assert torch.equal(kept.codes, Uniform()(task, generator()).codes)
    assert kept.notes[-1].startswith("uniform chosen")
    better = with_guard(method_named("gptq"))(task, generator())
    assert better.notes[-1].startswith("gptq chosen")
    assert objective(task, better) < objective(task, kept)


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(KanCompileError, match=f"layer 'layers.0': weight bits {bits}, expected 2 to 8"):
        problem(bits=bits)


@pytest.mark.parametrize("method", ["uniform", "gptq", "awq", "adaround", "brecq"])
def test_features_that_are_not_finite_name_the_layer(method):
    q = table_codes(64, 8, 0).float()
    q[3, 2] = torch.nan
    task = RoundingProblem(
        "blocks.3.kan", torch.ones(2, 8), FeatureSource.from_tensor(q), 4, tied_columns=torch.arange(8)
    )
    with pytest.raises(KanCompileError, match=r"layer 'blocks\.3\.kan': calibration features have NaN"):
        method_named(method)(task, generator())


def test_sizes_that_do_not_agree_are_refused():
    features = FeatureSource.from_tensor(table_codes(64, 8, 0))
    with pytest.raises(KanCompileError, match="features have 8 columns, expected 7"):
        RoundingProblem("l", torch.ones(2, 7), features, 4)
    with pytest.raises(KanCompileError, match="group sizes"):
        RoundingProblem("l", torch.ones(2, 8), features, 4, (3, 4))
    with pytest.raises(KanCompileError, match="weight has NaN"):
        RoundingProblem("l", torch.full((2, 8), torch.nan), features, 4)
    with pytest.raises(KanCompileError, match="found 0 calibration samples"):
        column_moments(FeatureSource.from_tensor(torch.empty(0, 8)), "l")
    with pytest.raises(KanCompileError, match="found 64 calibration rows in one pass, expected 65"):
        column_moments(dataclasses.replace(features, n=65), "l")


def test_unknown_methods_are_refused():
    with pytest.raises(KanCompileError, match=r"method 'rtn' is unknown, expected one of .*'gptq'.*'uniform'"):
        method_named("rtn")


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_every_method_is_deterministic_in_range_and_leaves_its_input_alone(name, bits):
    task = problem(bits=bits, dead=2, group_sizes=(15, 25), tied_columns=torch.arange(40) % 4)
    method = quick(name)
    before = task.weight.clone()
    torch.manual_seed(1)
    first = method(task, generator(3))
    torch.manual_seed(2)
    second = method(dataclasses.replace(task), generator(3))
    assert torch.equal(task.weight, before)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.offset, second.offset)
    assert first.codes.dtype == torch.int8
    assert first.scale.shape == (2, task.n_out)
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert int(first.codes.min()) >= low
    assert int(first.codes.max()) <= high
    assert bool((first.scale > 0).all())
    assert bool(torch.isfinite(first.offset).all())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_layers_without_any_live_column_round_to_nearest(name):
    features = FeatureSource.from_tensor(torch.full((32, 6), 9, dtype=torch.uint8))
    task = RoundingProblem("l", torch.randn(3, 6, generator=generator()), features, 4, tied_columns=torch.arange(6))
    rounded = quick(name)(task, generator())
    assert bool(torch.isfinite(rounded.scale).all())
    assert objective(task, rounded) < 1e-6
