import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.rounding_methods.quantizers import (
    code_range,
    minmax_scale,
    quantize,
    round_to_nearest,
    search_scale,
)

reals = st.floats(-1e3, 1e3, width=32)
weights = hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=reals)
bit_widths = st.integers(2, 8)


@given(weights, bit_widths)
def test_error_is_at_most_half_a_step_where_nothing_is_clipped(array, bits):
    weight = torch.from_numpy(array)
    scale = minmax_scale(weight, bits)
    codes = round_to_nearest(weight, scale[None], (weight.shape[1],), bits)
    error = (codes * scale[:, None] - weight).abs()
    # 2**-20 covers float32 rounding of the quotient, of the product and of the scale itself
    assert bool((error <= scale[:, None] / 2 + weight.abs() * 2**-20 + 1e-30).all())


@given(weights, bit_widths)
def test_rounding_is_idempotent(array, bits):
    weight = torch.from_numpy(array)
    scale = search_scale(weight, bits, (weight.shape[1],))
    codes = round_to_nearest(weight, scale, (weight.shape[1],), bits)
    again = round_to_nearest(codes * scale[0][:, None], scale, (weight.shape[1],), bits)
    assert torch.equal(codes, again)


@given(hnp.arrays("float32", st.integers(2, 30), elements=reals), bit_widths, st.floats(2**-10, 100, width=32))
def test_rounding_is_monotone_and_saturates(array, bits, scale):
    low, high = code_range(bits)
    codes = quantize(torch.from_numpy(array).sort().values, torch.tensor(scale), low, high)
    assert bool((codes.diff() >= 0).all())
    assert int(quantize(torch.tensor(1e30), torch.tensor(scale), low, high)) == high
    assert int(quantize(torch.tensor(-1e30), torch.tensor(scale), low, high)) == low


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range_uses_all_levels_except_one_of_8_bits(bits):
    low, high = code_range(bits)
    assert (low, high) == ((-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))


def test_ties_round_as_onnx_quantize_linear_does():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    # half to even first, then the odd zero point; the rounded sum would be [2, 2, 4, 0, 0]
    assert quantize(x, torch.tensor(1.0), -128, 127, zero_point=1).tolist() == [1, 3, 3, 1, -1]


def test_ties_equal_the_onnx_reference_evaluator():
    x = torch.arange(-40, 40, dtype=torch.float32) / 4
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "quantize",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [len(x)])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, [len(x)])],
        [
            onnx.numpy_helper.from_array(torch.tensor(0.5).numpy(), "s"),
            onnx.numpy_helper.from_array(torch.tensor(3, dtype=torch.int8).numpy(), "z"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    assert quantize(x, torch.tensor(0.5), -128, 127, zero_point=3).tolist() == expected.tolist()


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_zero_rows_and_tiny_weights_give_finite_scales_and_exact_codes(search):
    weight = torch.tensor([[0.0, 0.0, 0.0], [1e-38, -1e-38, 0.0], [1.0, -1.0, 0.0]])
    scale = search_scale(weight, 4, (3,), search)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert round_to_nearest(weight, scale, (3,), 4)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_scales_do_not_lose_to_minmax_under_their_own_criterion(bits):
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) ** 3
    importance = torch.rand(300, generator=torch.Generator().manual_seed(1))

    def error(search, power, cost):
        scale = search_scale(weight, bits, (300,), search, importance)
        rounded = round_to_nearest(weight, scale, (300,), bits) * scale[0][:, None]
        return (rounded - weight).abs().pow(power) @ cost

    assert bool((error("mse", 2.4, torch.ones(300)) <= error("minmax", 2.4, torch.ones(300)) * (1 + 1e-5)).all())
    assert bool((error("hessian", 2, importance) <= error("minmax", 2, importance) * (1 + 1e-5)).all())


def test_groups_get_scales_of_their_own():
    weight = torch.tensor([[1.0, -1.0, 100.0, -100.0]])
    scale = search_scale(weight, 8, (2, 2), "minmax")
    torch.testing.assert_close(scale, torch.tensor([[1 / 127], [100 / 127]]))
    assert round_to_nearest(weight, scale, (2, 2), 8).tolist() == [[127, -127, 127, -127]]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(KanCompileError, match=f"weight bits {bits}, expected 2 to 8"):
        code_range(bits)


def test_unknown_scale_search_is_refused():
    with pytest.raises(KanCompileError, match="scale search 'best', expected 'minmax', 'mse' or 'hessian'"):
        search_scale(torch.ones(1, 1), 8, (1,), "best")
