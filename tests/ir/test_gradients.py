from __future__ import annotations

import pytest
import torch

from kancompile.ir import Program, check, differentiable, quantized, show
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.round_weights import RoundingOptions, RoundWeights
from kancompile.passes.rounding_methods import Uniform
from kancompile.passes.tabulate_expansions import TableOptions, TabulateExpansions
from tests.convolution_programs import float_convolutions, integer_convolutions, square
from tests.passes.test_lowering_passes import round_uniform, tabulate
from tests.programs import calibration_inputs, float_program, integer_program


def stages(levels: int) -> list[Program]:
    tabulated = tabulate(float_program(), levels=levels)
    rounded = round_uniform(tabulated)
    return [tabulated, rounded, FuseIndex()(rounded)]


@pytest.mark.parametrize("levels", [256, 1024])
@pytest.mark.parametrize("stage", range(3))
def test_twin_has_equal_values_and_close_gradients(levels: int, stage: int) -> None:
    program = stages(levels)[stage]
    x = calibration_inputs(program, 64, seed=4)
    twin = differentiable(program)
    torch.testing.assert_close(twin(x), program(x), rtol=1e-3, atol=2e-3)

    exact, through = x.clone().requires_grad_(), x.clone().requires_grad_()
    float_program().graph_module(exact).sum().backward()
    twin.graph_module(through).sum().backward()
    assert exact.grad is not None
    assert through.grad is not None
    inside = (x.abs() < 2.5).all(1)
    difference = (exact.grad - through.grad)[inside].norm() / exact.grad[inside].norm()
    assert difference < 0.15


def wide(program: Program, seed: int = 5) -> torch.Tensor:
    return calibration_inputs(program, 300, seed)


PROGRAMS = {
    "8 bits": lambda: integer_program(),
    "2 bits, two scales": lambda: integer_program(weight_bits=2, groups=2),
    "many rows": lambda: integer_program(levels=(1024, 512)),
    "convolutions": lambda: integer_convolutions((3, 8, 8), [square(4, 3, padding=1), square(3, 3)], zero_point=40),
    "whole factors": lambda: round_uniform(tabulate(float_program()), granularity="group", group_size=2, bits=2),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_way_back_without_training_is_the_program(case: str) -> None:
    program = PROGRAMS[case]()
    back = quantized(differentiable(program, trainable=True))
    check(back)
    ours, theirs = program.graph_module.state_dict(), back.graph_module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert show(back) == show(program)
    x = wide(program)
    assert torch.equal(back(x), program(x))


@pytest.mark.parametrize("case", ["linear", "convolutions"])
def test_training_a_twin_pays_in_the_integer_program(case: str) -> None:
    if case == "linear":
        exact = float_program((6, 16, 4))
        program = FuseIndex()(round_uniform(tabulate(exact, levels=256), bits=2))
    else:
        exact = float_convolutions((3, 8, 8), [square(6, 3, padding=1), square(4, 3)])
        tabulated = TabulateExpansions(lambda name: TableOptions())(exact, calibration_inputs(exact, 48))
        options = RoundingOptions(Uniform(), "uniform", 2)
        program = FuseIndex()(RoundWeights(lambda name: options)(tabulated, calibration_inputs(exact, 48)))
    x, fresh = wide(program), wide(program, 6)
    target = exact(x)
    twin = differentiable(program, trainable=True)
    optimizer = torch.optim.Adam(twin.graph_module.parameters(), lr=2e-2)
    with torch.enable_grad():
        for _ in range(150):
            optimizer.zero_grad()
            loss = (twin.graph_module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
    trained = quantized(twin)
    check(trained)
    assert torch.allclose(trained(fresh), twin(fresh), atol=0.02 * float(target.std()))
    before, after = ((p(fresh) - exact(fresh)).double().square().mean() for p in (program, trained))
    assert after < 0.8 * before
