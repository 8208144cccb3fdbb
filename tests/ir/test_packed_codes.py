"""Packed codes come out as they went in, in PyTorch and in ONNX Runtime, however a runtime divides."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from kancompile.ir.packed_codes import DIGITS, MOST, ZERO_POINT, pack, unpack


def _codes(size: int) -> list[Tensor]:
    """Give all pairs, or the outermost and middle codes in all combinations and many random ones."""
    if size == 2:
        grid = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    else:
        ends = torch.tensor([0, 1, 2, 126, 127, 128, 129, 130, 253, 254, 255])
        random = torch.randint(256, (200_000, size), generator=torch.Generator().manual_seed(0))
        grid = torch.cat([torch.cartesian_prod(*[ends] * size).reshape(-1, size), random])
    return list(grid.to(torch.uint8).T)


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_codes_come_back(size: int) -> None:
    codes = _codes(size)
    word = pack(codes)
    assert word.dtype == (torch.uint8 if size == 1 else torch.float32)
    for code, found in zip(codes, unpack(word, size), strict=True):
        assert torch.equal(found, code)


def test_words_are_exact_integers_and_no_rounding_is_close() -> None:
    word = pack(_codes(3)).double()
    assert float(word.abs().max()) < 2**24
    for digit, rest in itertools.pairwise(reversed(DIGITS)):
        lower = ZERO_POINT * sum(d for d in DIGITS if d <= rest)
        assert lower / digit < 0.43
        # dividing and multiplying by a rounded reciprocal differ by a few units in the last place of at most 128
        assert 0.5 - lower / digit > 1000 * 128 * np.finfo(np.float32).eps


@pytest.mark.parametrize("size", [2, 3])
def test_onnx_runtime_takes_them_apart(size: int) -> None:
    nodes, word = [], "x"
    for place in range(size - 1, -1, -1):
        nodes.append(helper.make_node("QuantizeLinear", [word, f"digit{place}", "zero"], [f"code{place}"]))
        if place:
            nodes.append(
                helper.make_node("DequantizeLinear", [f"code{place}", f"digit{place}", "zero"], [f"part{place}"])
            )
            nodes.append(helper.make_node("Sub", [word, f"part{place}"], [f"rest{place}"]))
            word = f"rest{place}"
    constants = [helper.make_tensor(f"digit{place}", TensorProto.FLOAT, [], [DIGITS[place]]) for place in range(size)]
    constants.append(helper.make_tensor("zero", TensorProto.UINT8, [], [ZERO_POINT]))
    outputs = [helper.make_tensor_value_info(f"code{place}", TensorProto.UINT8, ["n"]) for place in range(size)]
    graph = helper.make_graph(
        nodes, "unpack", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])], outputs, constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = _codes(size)
    for code, found in zip(codes, session.run(None, {"x": pack(codes).numpy()}), strict=True):
        np.testing.assert_array_equal(found, code.numpy())
