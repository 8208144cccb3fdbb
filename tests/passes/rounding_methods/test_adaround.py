import dataclasses
import itertools

import pytest
import torch

from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.gptq import Gptq
from kancompile.passes.rounding_methods.problem import FeatureSource, objective, output_errors
from kancompile.passes.rounding_methods.soft_rounding import Schedule, SoftRounding
from kancompile.passes.rounding_methods.uniform import Uniform
from tests.passes.rounding_methods.rounding_problems import generator, problem, table_codes


def held_out(task, rounded):
    """Measure a rounding on samples it was not fitted to, drawn from the same factors."""
    q = table_codes(1024, task.c, 0)[512:].float()
    return float((q @ (task.weight - rounded.dequantized()).T - rounded.offset).square().mean())


def calibrated(bits):
    """A problem calibrated on the first half of the samples."""
    task = problem(bits=bits, c=40)
    return dataclasses.replace(task, features=FeatureSource.from_tensor(table_codes(1024, 40, 0)[:512], 200))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [2048, 0], ids=["covariance", "mini-batches"])
def test_held_out_error_is_below_nearest(bits, columns):
    task = calibrated(bits)
    learned = AdaRound(iterations=400, covariance_columns=columns, sweeps=0, keep_better=False)(task, generator())
    nearest = Uniform()(task, generator())
    assert held_out(task, learned) < held_out(task, nearest)
    assert objective(task, learned) < objective(task, nearest)


@pytest.mark.parametrize("bits", [3, 4])
def test_result_is_at_or_below_gptq_for_every_output(bits):
    task = calibrated(bits)
    learned, greedy = AdaRound(iterations=400)(task, generator()), Gptq()(task, generator())
    assert bool((output_errors(task, learned) <= output_errors(task, greedy)).all())
    assert not torch.equal(learned.codes, greedy.codes)
    assert "learned rounding is better than its start in" in learned.notes[-1]


def test_result_does_not_depend_on_the_gradient_mode_outside():
    task, method = calibrated(3), AdaRound(iterations=50)
    expected = method(task, generator())
    with torch.no_grad():
        assert torch.equal(method(task, generator()).codes, expected.codes)


def test_soft_weights_start_at_the_real_weights_and_end_hard():
    weight = torch.tensor([[0.32, -0.7, 5.0, -5.0]])
    step = torch.full_like(weight, 0.5)
    rounding = SoftRounding.between_levels(weight, step, -2, 1)
    expected = torch.tensor([[0.32, -0.7, 0.5, -1.0]])
    # h is kept 0.01 away from 0 and 1 so that its gradient does not vanish
    torch.testing.assert_close(rounding.soft().detach() * step, expected, rtol=0, atol=0.0051)
    optimizer = torch.optim.Adam([rounding.alpha], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        rounding.regulariser(2.0).backward()
        optimizer.step()
    assert torch.equal(rounding.hard(), torch.tensor([[1.0, -1.0, 1.0, -2.0]]))
    torch.testing.assert_close(rounding.soft().detach(), rounding.hard())


def test_taken_over_codes_stand_and_the_alternative_lies_towards_the_weight():
    codes = torch.tensor([[0, 1, -2, 0]], dtype=torch.int8)
    weight = torch.tensor([[0.4, 0.7, -3.0, -0.4]])
    rounding = SoftRounding.around_codes(codes, weight, torch.ones(1, 4), -2, 1)
    assert torch.equal(rounding.hard(), codes.float())
    assert rounding.base.tolist() == [[0, 0, -2, -1]]


def test_schedule_warms_up_then_falls_from_20_to_2():
    schedule = Schedule(100)
    values = [schedule.exponent(i) for i in range(100)]
    assert values[:20] == [None] * 20
    assert values[20] == 20
    assert all(a > b for a, b in itertools.pairwise(values[20:]))
    assert 2 < values[-1] < 2.5
