"""Capture of the public KAN families."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from kancompile.ir import check, show
from tests.frontend.capturing import branches, captured, contraction, draw, expansions, functions_are_shared


def build(family: str, *arguments: Any, **options: Any) -> nn.Module:
    model = importlib.import_module(f"examples.zoo.{family}").build(*arguments, **options)
    assert isinstance(model, nn.Module)
    return model


# family, options, functions of each input for every expansion of a layer, weight columns of the first layer
FAMILIES = [
    ("efficient_kan", {}, [9], 7 * 9),
    ("efficient_kan", {"enable_standalone_scale_spline": False, "grid_size": 3, "spline_order": 2}, [6], 7 * 6),
    ("fast_kan", {}, [8, 1], 7 * 9),
    ("fast_kan", {"use_base_update": False}, [8], 7 * 8),
    ("faster_kan", {}, [8], 7 * 8),
    ("chebyshev_kan", {}, [4], 7 * 4),  # degree 4; the constant polynomial goes to the bias
    ("chebyshev_kan", {"squash": "clamp", "layer_norm": False, "degree": 3}, [3], 7 * 3),
    ("gram_kan", {}, [4], 7 * 4),  # base branch and degrees 1 to 3; degree 0 goes to the bias
    ("fourier_kan", {}, [10], 7 * 10),
    ("fourier_kan", {"normalise": True, "grid_size": 3}, [6], 7 * 6),
]


@pytest.mark.parametrize(("family", "options", "functions", "columns"), FAMILIES)
def test_family_is_captured(family: str, options: dict[str, Any], functions: list[int], columns: int) -> None:
    if family == "fast_kan" and "use_base_update" in options:
        from examples.zoo import fast_kan

        model: nn.Module = fast_kan.FastKAN((7, 5, 4), torch.Generator().manual_seed(0), **options)
    else:
        model = build(family, (7, 5, 4), **options)
    program = captured(model, (7,))
    check(program)
    assert [layer.name for layer in program.layers()] == ["layers.0", "layers.1"]
    for number in (0, 1):
        assert [expansion.k for expansion in expansions(program, number)] == functions
        assert all(functions_are_shared(expansion) for expansion in expansions(program, number))
    assert contraction(program).weight.shape == (5, columns)
    assert "aten.mm" not in show(program)


def test_base_branch_and_spline_share_an_expansion() -> None:
    program = captured(build("efficient_kan", (6, 4)), (6,))
    (expansion,) = expansions(program)
    assert [branch.k for branch in branches(expansion)] == [1, 8]
    assert show(program).count("expand[") == 1


def test_constant_chebyshev_function_is_in_the_bias() -> None:
    model = build("chebyshev_kan", (6, 4), degree=3)
    program = captured(model, (6,))
    coefficients = model.get_parameter("layers.0.cheby_coeffs").detach()
    torch.testing.assert_close(contraction(program).bias, coefficients[:, :, 0].sum(0))
    torch.testing.assert_close(
        contraction(program).weight.reshape(4, 6, 3), coefficients[:, :, 1:].permute(1, 0, 2), rtol=0, atol=0
    )


def test_efficient_kan_weights_are_exact() -> None:
    model = build("efficient_kan", (6, 4))
    program = captured(model, (6,))
    weight = contraction(program).weight.reshape(4, 6, 9)
    layer = model.get_submodule("layers.0")
    assert torch.equal(weight[..., 0], layer.get_parameter("base_weight"))
    assert torch.equal(weight[..., 1:], layer.scaled_spline_weight())  # type: ignore[operator]
    assert not contraction(program).bias.any()


def test_fourier_bias_is_folded() -> None:
    model = build("fourier_kan", (5, 4, 3))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.copy_(draw(*value.shape, seed=4))
    program = captured(model, (5,))
    torch.testing.assert_close(contraction(program).bias, model.get_parameter("layers.0.bias")[0])


def test_updated_grids_give_functions_of_each_input() -> None:
    model = build("efficient_kan", (6, 5, 4))
    with torch.no_grad():
        model(draw(200, 6), update_grid=True)
    program = captured(model, (6,))
    assert [expansion.k for number in (0, 1) for expansion in expansions(program, number)] == [9, 9]
    assert not functions_are_shared(expansions(program, 0)[0])


@pytest.mark.parametrize("family", ["efficient_kan", "fast_kan", "chebyshev_kan"])
def test_tokens_stay_dimensions(family: str) -> None:
    program = captured(build(family, (6, 5, 4)), (3, 6), export_again=True)
    assert expansions(program)[0].in_shape == (3, 6)
    assert contraction(program).out_shape == (3, 5)
    assert contraction(program).n_out == 5


def test_capture_does_not_change_the_model() -> None:
    model = build("gram_kan", (6, 4)).train()
    model.get_submodule("layers.0").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    captured_program = captured(model, (6,))
    model.train()
    model.get_submodule("layers.0").eval()
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(tensor.data_ptr() not in own for tensor in captured_program.graph_module.state_dict().values())


def test_capture_is_deterministic() -> None:
    model = build("fast_kan", (6, 5, 4))
    state = torch.get_rng_state()
    first, second = captured(model, (6,)), captured(model, (6,))
    assert torch.equal(torch.get_rng_state(), state)
    assert show(first) == show(second)
    a, b = first.graph_module.state_dict(), second.graph_module.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
