import dataclasses
import itertools

import pytest
import torch

import kancompile.passes.rounding_methods.problem
from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.rounding_methods.gptq import Gptq, ordered_hessian, round_columns
from kancompile.passes.rounding_methods.hessian import FactoredHessian, permute_symmetric
from kancompile.passes.rounding_methods.polish import RoundedColumns, descend_codes, quadratic_error, refine_scale
from kancompile.passes.rounding_methods.problem import objective
from kancompile.passes.rounding_methods.uniform import Uniform
from tests.passes.rounding_methods.rounding_problems import generator, problem

PLAIN = Gptq(sweeps=0, scale_factors=(1.0,))


def correlated(seed, c=48, n_out=24):
    """Draw weights ``[n_out, c]``, a correlated Hessian ``[c, c]`` and 4-bit scales ``[n_out]``, all float64."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, c, generator=draw, dtype=torch.float64)
    mix = torch.randn(c, c, generator=draw, dtype=torch.float64)
    x = torch.randn(2 * c, c // 2, generator=draw, dtype=torch.float64) @ mix[: c // 2]
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(c, dtype=torch.float64)
    return weight, hessian, weight.abs().amax(1) / 7


def brute_force_obs(weight, hessian, scale):
    """Optimal Brain Surgeon: after each column, spread its error by the inverse of the Hessian that remains."""
    weight = weight.clone()
    codes = torch.empty_like(weight)
    for k in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[k:, k:])
        codes[:, k] = torch.clamp(torch.round(weight[:, k] / scale), -8, 7)
        error = (weight[:, k] - codes[:, k] * scale) / inverse[0, 0]
        weight[:, k:] -= error[:, None] * inverse[0]
    return codes


def algorithm_1(weight, hessian, scale, factor):
    """The loop of the paper with any matrix in the place of the Cholesky factor of the inverse."""
    weight = weight.clone()
    codes = torch.empty_like(weight)
    for k in range(weight.shape[1]):
        codes[:, k] = torch.clamp(torch.round(weight[:, k] / scale), -8, 7)
        error = (weight[:, k] - codes[:, k] * scale) / factor[k, k]
        weight[:, k:] -= error[:, None] * factor[k, k:]
    return codes


def loss(weight, hessian, scale, codes):
    difference = weight - codes * scale[:, None]
    return float(((difference @ hessian) * difference).sum())


def ours(weight, hessian, scale, block=128):
    factored = FactoredHessian(hessian.clone(), 1e-12, "l")
    return round_columns(weight.T.contiguous(), factored.packed, scale[None], -8, 7, block).T


@pytest.mark.parametrize("seed", range(20))
def test_codes_equal_brute_force_optimal_brain_surgeon(seed):
    weight, hessian, scale = correlated(seed)
    assert torch.equal(ours(weight, hessian, scale), brute_force_obs(weight, hessian, scale))


def test_codes_equal_the_paper_loop_and_differ_from_rows_of_the_inverse():
    totals = dict.fromkeys(["ours", "rows", "nearest"], 0.0)
    for seed in range(20):
        weight, hessian, scale = correlated(seed)
        inverse = torch.linalg.inv(hessian)
        codes = ours(weight, hessian, scale)
        upper = torch.linalg.cholesky(inverse, upper=True)
        assert torch.equal(codes, algorithm_1(weight, hessian, scale, upper))
        wrong = algorithm_1(weight, hessian, scale, inverse)
        assert not torch.equal(codes, wrong)
        nearest = torch.clamp(torch.round(weight / scale[:, None]), -8, 7)
        for name, candidate in (("ours", codes), ("rows", wrong), ("nearest", nearest)):
            totals[name] += loss(weight, hessian, scale, candidate)
    assert totals["ours"] < 0.6 * totals["rows"]
    assert totals["ours"] < 0.6 * totals["nearest"]


@pytest.mark.parametrize("block", [1, 5, 48])
def test_lazy_updates_change_nothing(block):
    weight, hessian, scale = correlated(3)
    assert torch.equal(ours(weight, hessian, scale, block), ours(weight, hessian, scale))


def test_factor_spans_blocks_and_keeps_the_hessian_below_it(monkeypatch):
    monkeypatch.setattr("kancompile.passes.rounding_methods.hessian._BLOCK", 13)
    _, hessian, _ = correlated(1)
    factored = FactoredHessian(hessian.clone(), 1e-12, "l")
    upper = factored.packed.triu()
    torch.testing.assert_close(upper @ upper.T, hessian)
    torch.testing.assert_close(factored.columns(7, 30), hessian[:, 7:30])
    x = torch.randn(48, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(factored.multiply(x), hessian @ x)
    order = torch.randperm(48, generator=generator())
    permuted = hessian.clone()
    permute_symmetric(permuted, order)
    assert torch.equal(permuted, hessian[order][:, order])


def test_failed_factorization_raises_the_damping_and_says_so(monkeypatch):
    monkeypatch.setattr("kancompile.passes.rounding_methods.hessian._BLOCK", 13)
    x = torch.randn(20, 40, generator=generator())
    covariance = x.T @ x - 0.5 * torch.eye(40)  # smallest eigenvalue -0.5, mean of the diagonal near 20
    factored = FactoredHessian(covariance.clone(), 0.001, "l")
    assert (
        factored.notes
        == (
            "Hessian not positive definite, damping raised to 0.01",
            "Hessian not positive definite, damping raised to 0.1",
        )[: len(factored.notes)]
    )
    assert factored.notes
    damped = covariance + factored.damping * torch.eye(40)
    torch.testing.assert_close(factored.columns(0, 40), damped)
    upper = factored.packed.triu()
    torch.testing.assert_close(upper @ upper.T, damped, rtol=1e-4, atol=1e-3)
    with pytest.raises(KanCompileError, match="layer 'l': Hessian is not positive definite"):
        FactoredHessian(torch.full((3, 3), torch.nan), 0.01, "l")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_falls_from_nearest_over_algorithm_1_to_polished(bits):
    task = problem(bits=bits, c=60, n_out=16)
    nearest, plain, full = (objective(task, method(task, generator())) for method in (Uniform(), PLAIN, Gptq()))
    assert plain < 0.6 * nearest
    assert full <= plain


def test_polishing_never_raises_the_error_and_ends_where_no_single_code_helps():
    task = problem(bits=2, c=50, group_sizes=(20, 30))
    hessian, columns = ordered_hessian(task, task.second_moments(), 0.01, True, "cpu")
    start = PLAIN(task, generator())
    state = RoundedColumns(
        task.weight[:, columns].T.contiguous(),
        start.codes[:, columns].float().T.contiguous(),
        start.scale.clone(),
        task.group_of_column[columns],
        -2,
        1,
    )
    errors = [quadratic_error(hessian, state.error())]
    gradient = hessian.multiply(state.error())
    for _ in range(40):
        refine_scale(state, hessian, gradient)
        errors.append(quadratic_error(hessian, state.error()))
        changed = descend_codes(state, hessian, gradient)
        errors.append(quadratic_error(hessian, state.error()))
        torch.testing.assert_close(gradient, hessian.multiply(state.error()), rtol=1e-3, atol=1e-3)
        if not changed:
            break
    assert changed == 0
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4)).all())
    best = errors[-1]
    for k in range(hessian.m):
        for code in range(-2, 2):
            other = dataclasses.replace(state, codes=state.codes.clone())
            other.codes[k] = code
            assert bool((quadratic_error(hessian, other.error()) >= best * (1 - 1e-4)).all())


def test_least_squares_scale_is_the_minimum_over_scales():
    task = problem(bits=3, c=30)
    hessian, columns = ordered_hessian(task, task.second_moments(), 0.01, True, "cpu")
    start = PLAIN(task, generator())
    weight, codes = task.weight[:, columns].T.contiguous(), start.codes[:, columns].float().T.contiguous()
    group = task.group_of_column[columns]
    state = RoundedColumns(weight, codes, start.scale.clone(), group, -4, 3)
    refine_scale(state, hessian, hessian.multiply(state.error()))
    best = quadratic_error(hessian, state.error())
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = dataclasses.replace(state, scale=state.scale * factor)
        assert bool((quadratic_error(hessian, other.error()) >= best).all())


def test_fewer_samples_than_columns_are_noted_with_the_rank():
    task = problem(n=50, c=80, latent=40)
    (note,) = Gptq()(task, generator()).notes
    assert note.startswith("50 calibration samples for 80 columns that vary, numerical rank 49")
    assert Gptq()(problem(n=512), generator()).notes == ()


def test_covariance_that_is_not_kept_gives_the_same_codes(monkeypatch):
    kept = Gptq()(problem(bits=3), generator())
    monkeypatch.setattr(kancompile.passes.rounding_methods.problem, "_CACHED_BYTES", 0)
    monkeypatch.setattr(kancompile.passes.rounding_methods.problem, "_FLOAT64_COLUMNS", 1 << 20)
    again = Gptq()(problem(bits=3), generator())
    assert torch.equal(kept.codes, again.codes)


@pytest.mark.needs("cuda")
def test_cuda_is_as_good_as_the_cpu():
    task = problem(bits=3, c=200, n=2000)
    cpu, cuda = (objective(task, Gptq(device=device)(task, generator())) for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=0.05)


def test_factored_hessian_multiplies_by_any_of_its_columns(monkeypatch):
    import kancompile.passes.rounding_methods.hessian as module

    monkeypatch.setattr(module, "_BLOCK", 16)  # several blocks, the last one not full
    _, hessian, _ = correlated(3, c=75)
    factored = FactoredHessian(hessian.clone(), 0.01, "l")
    whole = hessian.clone()
    whole.diagonal().add_(factored.damping)
    draw = torch.Generator().manual_seed(0)
    for count in (1, 20, 75):
        positions = torch.randperm(75, generator=draw)[:count].sort().values
        x = torch.randn(count, 4, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(factored.multiply_at(positions, x), whole[:, positions] @ x, rtol=1e-9, atol=1e-9)
