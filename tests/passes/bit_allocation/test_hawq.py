import pytest
import torch
from torch.nn import functional

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.bit_allocation.hawq import hessian_traces, sensitivity
from tests.passes.rounding_methods.rounding_problems import generator


def small_net():
    """A two-layer net with a smooth activation; its parts are columns 0-2 and 3-5 of the first layer, and the second."""
    draw = generator(1)
    x, y = torch.randn(50, 6, generator=draw), torch.randint(0, 3, (50,), generator=draw)
    weights = [torch.randn(4, 6, generator=draw), torch.randn(3, 4, generator=draw)]
    parts = [torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(4, dtype=torch.int64)]

    def loss(ws):
        return functional.cross_entropy(torch.tanh(x @ ws[0].T) @ ws[1].T, y)

    return loss, weights, parts


def exact_average_traces(loss, weights, parts):
    result = []
    for i, weight in enumerate(weights):
        full = torch.autograd.functional.hessian(lambda w, i=i: loss([*weights[:i], w, *weights[i + 1 :]]), weight)
        diagonal = full.reshape(weight.numel(), -1).diagonal().reshape(weight.shape)
        n_parts = int(parts[i].max()) + 1
        result.append(torch.stack([diagonal[:, parts[i] == part].mean() for part in range(n_parts)]))
    return result


def test_estimates_lie_within_their_errors_of_exact_traces():
    loss, weights, parts = small_net()
    traces = hessian_traces(loss, weights, parts, generator(), max_probes=1000, tolerance=0.0)
    assert traces.probes == 1000
    assert not traces.converged
    for average, spread, exact in zip(
        traces.average, traces.spread, exact_average_traces(loss, weights, parts), strict=True
    ):
        assert bool(((average - exact).abs() <= 5 * spread).all())
        assert bool((spread <= 0.15 * exact.abs().max()).all())  # the check above must be able to fail


def test_result_does_not_depend_on_the_gradient_mode_outside():
    loss, weights, parts = small_net()
    expected = hessian_traces(loss, weights, parts, generator(), max_probes=3)
    with torch.no_grad():
        found = hessian_traces(loss, weights, parts, generator(), max_probes=3)
    assert all(torch.equal(a, b) for a, b in zip(found.average, expected.average, strict=True))
    assert all(bool((average != 0).any()) for average in found.average)


def test_one_probe_is_exact_for_a_diagonal_hessian():
    curvature = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    traces = hessian_traces(
        lambda ws: (curvature * ws[0].square()).sum() / 2, [torch.ones(2, 3)], [torch.tensor([0, 1, 1])], generator()
    )
    assert traces.converged
    assert traces.probes == 2
    torch.testing.assert_close(traces.average[0], torch.tensor([2.5, 4.0], dtype=torch.float64))


def test_probes_stop_at_the_limit_and_at_the_tolerance():
    loss, weights, parts = small_net()
    assert hessian_traces(loss, weights, parts, generator(), max_probes=7, tolerance=0.0).probes == 7
    loose = hessian_traces(loss, weights, parts, generator(), max_probes=100, tolerance=0.5)
    assert loose.converged
    assert loose.probes < 100


def test_linear_loss_and_unused_layer_have_no_curvature():
    weights = [torch.ones(2, 3), torch.ones(2, 2)]
    parts = [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
    with torch.no_grad():
        traces = hessian_traces(lambda ws: ws[0].sum(), weights, parts, generator())
    assert [float(average) for average in traces.average] == [0.0, 0.0]


def test_sensitivity_predicts_the_rise_of_a_quadratic_loss():
    curvature = torch.full((2, 4), 3.0)
    weight = torch.randn(2, 4, generator=generator())
    rounded = weight.round()
    part = torch.tensor([0, 0, 1, 1])
    traces = hessian_traces(lambda ws: (curvature * ws[0].square()).sum(), [weight], [part], generator())
    rise = sensitivity(traces.average[0], weight, rounded, part)
    expected = 2 * 3.0 * (weight - rounded).double().square()
    torch.testing.assert_close(rise, torch.stack([expected[:, :2].sum(), expected[:, 2:].sum()]))
    assert float(sensitivity(torch.tensor([-1.0, 0.0]), weight, rounded, part).sum()) == 0


def test_losses_that_are_not_finite_are_refused():
    with pytest.raises(KanCompileError, match="sensitivity: loss is nan"):
        hessian_traces(
            lambda ws: ws[0].sum() * torch.nan, [torch.ones(1, 1)], [torch.zeros(1, dtype=torch.int64)], generator()
        )
