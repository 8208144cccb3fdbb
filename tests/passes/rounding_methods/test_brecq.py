import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.rounding_methods.brecq import Block, Brecq
from kancompile.passes.rounding_methods.gptq import Gptq
from kancompile.passes.rounding_methods.problem import FeatureSource, RoundingProblem
from tests.passes.rounding_methods.rounding_problems import generator, table_codes


def two_layers(bits=2, gradients=None):
    """Build two layers with a smooth squashing to codes between them, each rounded by GPTQ on its own."""
    draw = generator(5)
    q = table_codes(512, 24, 3)
    first = 0.02 * torch.randn(16, 24, generator=draw)
    second = 0.02 * torch.randn(4, 16, generator=draw)

    def between(h):
        return 255 * torch.sigmoid(h)

    def forward(weights, offsets, x):
        h = (x.float() - 128) @ weights[0].T + offsets[0]
        return between(h) @ weights[1].T + offsets[1]

    zeros = (torch.zeros(16), torch.zeros(4))
    targets = forward((first, second), zeros, q)
    hidden = between((q.float() - 128) @ first.T)
    problems = (
        RoundingProblem("a", first, FeatureSource.from_tensor(q.float() - 128), bits),
        RoundingProblem("b", second, FeatureSource.from_tensor(hidden), bits),
    )
    start = tuple(Gptq()(problem, generator()) for problem in problems)
    return Block(problems, forward, q, targets, gradients), start


def weighted_error(block, layers, weight=None):
    y = block.forward(
        [rounded.codes.float() * rounded.scale.T for rounded in layers],
        [rounded.offset for rounded in layers],
        block.inputs,
    )
    error = (y - block.targets).square()
    return float((error if weight is None else error * weight).mean())


@pytest.mark.parametrize("bits", [2, 3])
def test_block_error_falls_below_layer_by_layer(bits):
    block, start = two_layers(bits)
    result = Brecq(iterations=500).reconstruct(block, start, generator())
    assert weighted_error(block, result) < 0.8 * weighted_error(block, start)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for rounded in result:
        assert rounded.codes.dtype == torch.int8
        assert int(rounded.codes.min()) >= low
        assert int(rounded.codes.max()) <= high
        assert bool((rounded.scale > 0).all())
    assert "reconstruction lowered the weighted error" in result[0].notes[-1]


def test_fisher_weights_move_the_effort_to_what_the_loss_feels():
    gradients = torch.zeros(512, 4)
    gradients[:, 0] = 1.0
    block, start = two_layers(2, gradients)
    plain, _ = two_layers(2)
    felt = Brecq(iterations=400, fisher_floor=0.0).reconstruct(block, start, generator())
    even = Brecq(iterations=400).reconstruct(plain, start, generator())
    assert weighted_error(block, felt, gradients) < weighted_error(block, even, gradients)


def test_start_is_kept_where_nothing_is_gained():
    block, start = two_layers(3)
    result = Brecq(iterations=5, learning_rate=10.0, scale_learning_rate=2.0).reconstruct(block, start, generator())
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(result, start, strict=True))
    assert "reconstruction kept its start" in result[0].notes[-1]


def test_same_seed_gives_the_same_result():
    block, start = two_layers(2)
    method = Brecq(iterations=60)
    first, second = (method.reconstruct(block, start, generator(9)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.offset, b.offset)


def test_works_where_gradients_are_switched_off_outside():
    block, start = two_layers(2)
    with torch.no_grad():
        result = Brecq(iterations=60).reconstruct(block, start, generator())
    assert len(result) == 2


def test_shapes_and_values_are_checked():
    with pytest.raises(KanCompileError, match=r"block \['a', 'b'\]: found 512 inputs"):
        two_layers(2, torch.zeros(512, 5))
    with pytest.raises(KanCompileError, match="gradients have NaN"):
        two_layers(2, torch.full((512, 4), torch.nan))
