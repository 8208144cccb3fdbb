from __future__ import annotations

import pytest
import torch

from kancompile.ir import Program, differentiable
from kancompile.passes.fuse_index import FuseIndex
from tests.passes.test_lowering_passes import round_uniform, tabulate
from tests.programs import calibration_inputs, float_program


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
