"""The passes on convolutions: tables, rounding and fusion, each against the float program or brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import (
    Contraction,
    Expansion,
    Geometry,
    HandOver,
    IntegerContraction,
    PatchSampler,
    Program,
    TableExpansion,
    check,
    differentiable,
    flat_weight,
    show,
    split_groups,
)
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.round_weights import RoundWeights
from kancompile.passes.round_weights.integers import integer_modules
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.rows import convolution_problems
from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.awq import Awq
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.passes.rounding_methods.gptq import Gptq
from kancompile.passes.rounding_methods.problem import Rounded, objective
from kancompile.passes.rounding_methods.uniform import Uniform
from kancompile.passes.split_branches import SplitBranches
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.targets.onnx.export import emit
from kancompile.validation.kernel_audit import audit_kernels
from tests.convolution_programs import Convolution, base_branch, float_convolutions, polynomial_branch, square
from tests.passes.test_lowering_passes import signal_to_noise
from tests.programs import calibration_inputs
from tests.saturation import adds_products_exactly
from tests.targets.test_ort_cpu import run

PADDED = [square(6, 3, padding=1), square(8, 3, stride=2, padding=1, groups=2), square(5, 3)]


def tabulate(program: Program, n: int = 48, **options: object) -> Program:
    return TabulateExpansions(lambda name: TableOptions(**options))(program, calibration_inputs(program, n))


def rounded_by(
    program: Program, method: object = None, bits: int = 8, n: int = 48, int16_pairs: bool | None = None
) -> Program:
    pairs = not adds_products_exactly() if int16_pairs is None else int16_pairs
    options = RoundingOptions(method or Uniform(), "a method", bits, int16_pairs=pairs)
    return RoundWeights(lambda name: options)(program, calibration_inputs(program, n))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((1, 1), (0, 0), (1, 1)),
        Geometry((2, 1), (1, 2), (1, 1)),
        Geometry((1, 2), (2, 0), (2, 1)),
        Geometry((1, 1), (1, 1), (1, 1), 2),
    ],
)
def test_float_contraction_is_conv2d_of_concatenated_features(geometry: Geometry) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 7, 8, 4, k, generator=generator) for k in (1, 3)]
    weight = torch.randn(6, 16 // geometry.groups, 3, 3, generator=generator)
    bias = torch.randn(6, generator=generator)
    out_shape = (6, *geometry.out_size((7, 8), (3, 3)))
    found = Contraction("layer", weight, bias, out_shape, geometry)(*features)
    # the columns of a group are its channels of the first feature, then those of the second
    images = [feature.permute(0, 3, 4, 1, 2).flatten(1, 2) for feature in features]
    chunks = [image.chunk(geometry.groups, 1) for image in images]
    order = [parts[group] for group in range(geometry.groups) for parts in chunks]
    expected = nn.functional.conv2d(
        torch.cat(order, 1), weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )
    torch.testing.assert_close(found, expected)
    assert tuple(found.shape[1:]) == out_shape


def test_patches_times_weight_is_the_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    for geometry, kernel, spatial in [
        (Geometry((1, 2), (1, 0), (2, 1), 2), (3, 2), (7, 6)),
        (Geometry((2,), (2,), (1,)), (5,), (11,)),
        (Geometry((1, 2, 1), (1, 1, 0), (1, 1, 1)), (3, 3, 1), (5, 6, 4)),
    ]:
        x = torch.randn(3, *spatial, 4, generator=generator)
        weight = torch.randn(6, 4 // geometry.groups, *kernel, generator=generator)
        contraction = Contraction("layer", weight, torch.zeros(6), (), geometry)
        sampler = PatchSampler(geometry, kernel, spatial)
        image, position = sampler.draw(3, 30, generator)
        assert len(set(zip(image.tolist(), position.tolist(), strict=True))) == len(image) <= 30
        patches = split_groups(sampler.take(x, image, position, 0.0), geometry.groups)
        products = [part @ own.T for part, own in zip(patches, flat_weight(weight, geometry.groups), strict=True)]
        expected = contraction(x[..., None]).flatten(2)[image, :, position]
        torch.testing.assert_close(torch.cat(products, 1), expected, rtol=1e-4, atol=1e-5)


PASSES = {
    "tabulate": tabulate,
    "round": rounded_by,
    "fuse": lambda program: FuseIndex()(program),
}


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_every_pass_keeps_its_contract(split: bool, same: bool) -> None:
    program = float_convolutions((4, 8, 8), PADDED, split=split, same_functions=same)
    check(program)
    x = calibration_inputs(program, 16, seed=2)
    exact = program(x)
    for run_pass in PASSES.values():
        before, text = program(x), show(program)
        after = run_pass(program)
        check(after)
        assert show(program) == text, "the input changed"
        assert torch.equal(program(x), before), "the input changed"
        assert signal_to_noise(exact, after(x)) > 32
        assert run_pass(after) is after, "a second run did something"
        program = after
    model = emit(program, {})
    audit = audit_kernels(model)
    assert not audit.problems, audit.table()
    assert [row.operator for row in audit.rows] == ["QLinearConv"] * 3
    np.testing.assert_array_equal(run(model, x), program(x).numpy())


def test_tables_are_shared_exactly_where_functions_agree() -> None:
    shared = tabulate(float_convolutions((3, 8, 8), [square(4, 3)]))
    own = tabulate(float_convolutions((3, 8, 8), [square(4, 3)], same_functions=False))
    assert shared.module("layer0_expand0").n_tables == 1
    assert own.module("layer0_expand0").n_tables == 3


@pytest.mark.parametrize("split", [True, False])
def test_code_of_zero_is_exact_where_there_is_padding(split: bool) -> None:
    program = tabulate(float_convolutions((3, 8, 8), [square(4, 3, padding=1)], split=split))
    zero_point = program.module("layer0_convolve").zero_point
    for target in program.layers()[0].expansions:
        table = program.module(target)
        assert isinstance(table, TableExpansion)
        torch.testing.assert_close(table.offset, -zero_point * table.scale)
        # silu(tanh(x)^0) is constant, yet missing outside the image: it must keep a column of its own
        if table.k > 1:
            constant = table.table[:, 0].float() * table.scale[0, 0] + table.offset[0, 0]
            torch.testing.assert_close(constant, torch.full_like(constant, 0.7311), rtol=0.01, atol=0.01)


def test_border_pixels_are_as_good_as_inner_ones() -> None:
    program = float_convolutions((3, 10, 10), [square(6, 3, padding=1)])
    x = calibration_inputs(program, 32, seed=5)
    exact, found = program(x), FuseIndex()(rounded_by(tabulate(program), int16_pairs=False))(x)
    border = torch.ones(10, 10, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    at_border = signal_to_noise(exact[..., border], found[..., border])
    inside = signal_to_noise(exact[..., ~border], found[..., ~border])
    assert at_border > 35
    assert abs(at_border - inside) < 3
    # with the constant as a bias, border pixels would be wrong by what the missing taps contribute
    weight = program.module("layer0_convolve").weight
    missing = weight[:, ::4, 0].sum((1, 2)) * 0.7311
    assert missing.abs().mean() > 20 * (exact - found)[..., border].abs().mean()


def test_columns_without_padding_use_all_codes() -> None:
    table = tabulate(float_convolutions((3, 8, 8), [square(4, 3)]), column_scaling=1.0).module("layer0_expand0")
    codes = table.table.long()
    assert codes[:, 0].unique().tolist() == [0]
    assert codes[:, 1:].amin(0).tolist() == [0] * 3
    assert codes[:, 1:].amax(0).tolist() == [255] * 3


@pytest.mark.parametrize(
    ("method", "bits"),
    [(Uniform(), 4), (Gptq(), 4), (Awq(), 4), (AdaRound(iterations=60), 4), (Brecq(iterations=40), 4), (Gptq(), 2)],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
@pytest.mark.parametrize("zero", [True, False])
def test_every_method_rounds_convolutions(method: object, bits: int, zero: bool) -> None:
    layers = [square(6, 3, padding=int(zero)), square(5, 3, padding=int(zero))]
    program = tabulate(float_convolutions((3, 8, 8), layers))
    x = calibration_inputs(program, 24, seed=7)
    found, nearest = rounded_by(program, method, bits), rounded_by(program, Uniform(), bits)
    check(found)
    assert int(found.module("layer1_convolve").weight.abs().max()) <= 1 << (bits - 1)
    quality, limit = signal_to_noise(program(x), found(x)), signal_to_noise(program(x), nearest(x))
    assert quality > limit - 0.5
    assert quality > 6 * bits - 9


def test_rounding_error_is_that_of_the_convolution() -> None:
    program = tabulate(float_convolutions((4, 8, 8), [square(6, 3, stride=2, padding=1, groups=2)]))
    layer, x = program.layers()[0], calibration_inputs(program, 10)
    problems = convolution_problems(program, layer, x, 4, torch.Generator().manual_seed(0))
    assert [problem.features.n for problem in problems] == [160, 160], "all output pixels"
    rounded = [Uniform()(problem, torch.Generator()) for problem in problems]
    merged = Rounded(
        torch.cat([part.codes for part in rounded]),
        torch.cat([part.scale for part in rounded], 1),
        torch.cat([part.offset for part in rounded]),
        (),
        rounded[0].group_sizes,
    )
    integers = program.replace_modules(integer_modules(program, layer, merged, 4))
    integers = integers.replace_modules({layer.contraction: integers.module(layer.contraction).unrounded()})
    expected = float((integers(x) - program(x)).double().square().mean())
    found = sum(objective(problem, part) for problem, part in zip(problems, rounded, strict=True)) / 2
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("same", [True, False])
def test_awq_rounds_channel_groups(same: bool) -> None:
    layers = [square(4, 3, padding=1, groups=2)]
    program = tabulate(float_convolutions((4, 8, 8), layers, same_functions=same))
    x = calibration_inputs(program, 24, seed=7)
    assert signal_to_noise(program(x), rounded_by(program, Awq(), 4)(x)) > 15


def test_granularity_that_convolutions_cannot_have_is_said() -> None:
    program = SplitBranches(lambda name: True)(float_convolutions((3, 8, 8), [square(4, 3)]))
    assert len(program.layers()[0].expansions) == 1
    options = RoundingOptions(Uniform(), "uniform", 8, "branch")
    rounded = RoundWeights(lambda name: options)(tabulate(program), calibration_inputs(program, 8))
    assert any("one weight scale for each output channel, not for each branch" in note for note in rounded.notes)


def test_memory_bounds_the_rows() -> None:
    program = tabulate(float_convolutions((4, 8, 8), [square(6, 3, padding=1)]))
    layer, x = program.layers()[0], calibration_inputs(program, 20)
    row = 4 * 4 * 9 * 2
    for kind in ({"rows": 50}, {"max_bytes": 50 * row}, {"rows": 7}):
        problem = convolution_problems(program, layer, x, 4, torch.Generator().manual_seed(0), **kind)[0]
        assert problem.features.n == min(kind.get("rows", 50), 40)  # two pixels of each image
    first, second = (
        torch.cat(list(convolution_problems(program, layer, x, 4, torch.Generator().manual_seed(3))[0].features))
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_rescaled_tables_keep_the_code_of_zero() -> None:
    program = tabulate(float_convolutions((3, 8, 8), [square(4, 3, padding=1)]))
    layer = program.layers()[0]
    problem = convolution_problems(program, layer, calibration_inputs(program, 8), 8, torch.Generator().manual_seed(0))[
        0
    ]
    assert problem.tied_columns is not None
    shrink = torch.tensor([0.5, 1.0, 0.8, 0.6])[problem.tied_columns]
    exact = Rounded(
        torch.zeros(4, problem.c, dtype=torch.int8), torch.ones(1, 4), torch.zeros(4), (), (problem.c,), shrink
    )
    modules = integer_modules(program, layer, exact, 8)
    before, after = program.module("layer0_expand0"), modules["layer0_expand0"]
    real = [table.table.float() * table.scale + table.offset for table in (before, after)]
    assert ((real[0] - real[1]).abs() <= after.scale / 2 * 1.001).all()
    zero_point = program.module("layer0_convolve").zero_point
    torch.testing.assert_close(after.offset, -zero_point * after.scale, rtol=1e-4, atol=1e-5)


def test_fusion_through_max_pooling_and_beside_other_readers() -> None:
    program = pooled_program()
    x = calibration_inputs(program, 24, seed=4)
    tabulated = tabulate(program)
    assert tabulated.module("second_expand").index.is_8_bit
    assert tabulated.module("first").output is None
    rounded = rounded_by(tabulated)
    fused = FuseIndex()(rounded)
    first = fused.module("first")
    assert isinstance(first, IntegerContraction)
    assert first.hands_over == HandOver("real", fused.module("second_expand").index)
    assert fused.module("second").output is not None
    assert signal_to_noise(program(x), fused(x)) > 33
    model = emit(fused, {})
    audit = audit_kernels(model)
    assert not audit.problems, audit.table()
    np.testing.assert_allclose(run(model, x), fused(x).numpy(), rtol=1e-6, atol=1e-6)


def pooled_program() -> Program:
    """A convolution, max-pooling, a second one, and its output beside an average."""
    graph = fx.Graph()
    root: dict[str, nn.Module] = {}
    generator = torch.Generator().manual_seed(0)

    def layer(name: str, value: fx.Node, shape: tuple[int, ...], n_out: int) -> fx.Node:
        branches = [polynomial_branch(shape, 2, None), base_branch(shape)]
        root[f"{name}_expand"] = Expansion(shape, branches, channels_first=True)
        weight = torch.randn(n_out, shape[0] * 4, 3, 3, generator=generator) / (shape[0] * 36) ** 0.5
        geometry = Geometry((1, 1), (1, 1), (1, 1))
        root[name] = Contraction(name, weight, torch.zeros(n_out), (n_out, *shape[1:]), geometry)
        return graph.call_module(name, (graph.call_module(f"{name}_expand", (value,)),))

    value = layer("first", graph.placeholder("x"), (3, 8, 8), 6)
    value = graph.call_function(torch.ops.aten.max_pool2d.default, (value, [2, 2], [2, 2]))
    value = layer("second", value, (6, 4, 4), 5)
    mean = graph.call_function(torch.ops.aten.mean.dim, (value, [2, 3], True))
    graph.output(graph.call_function(torch.ops.aten.sub.Tensor, (value, mean)))
    return Program(fx.GraphModule(root, graph), (3, 8, 8))


def test_levels_above_256_between_convolutions_are_capped_and_said() -> None:
    program = tabulate(float_convolutions((3, 8, 8), [square(4, 3), square(4, 3)]), levels=1024)
    assert program.module("layer0_expand0").index.levels == 1024
    assert program.module("layer1_expand0").index.levels == 256
    assert any("not the 1024 asked for" in note for note in program.notes)


@pytest.mark.parametrize(("layers", "cosine"), [(1, 0.99), (2, 0.93)])
@pytest.mark.parametrize("fused", [True, False])
def test_twin_has_equal_values_and_gradients(fused: bool, layers: int, cosine: float) -> None:
    original = float_convolutions((3, 8, 8), [square(4, 3, padding=1)] * layers)
    rounded = rounded_by(tabulate(original, range="minmax"))  # beyond a clipped range there would be no gradient
    program = FuseIndex()(rounded) if fused else rounded
    x = 0.7 * calibration_inputs(program, 8, seed=3)
    twin = differentiable(program)
    expected, found = program(x), twin(x)
    step = program.module(program.layers()[-1].contraction).output.scale
    # float32 sums may fall on the other side of a rounding, here and there
    assert ((expected - found).abs() > 1e-4).float().mean() < 0.01
    assert (expected - found).abs().max() < 8 * step
    exact, through = x.clone().requires_grad_(), x.clone().requires_grad_()
    original.graph_module(exact).square().sum().backward()
    twin.graph_module(through).square().sum().backward()
    assert exact.grad is not None
    assert through.grad is not None
    # slopes between rows of 8-bit codes are noisy, 7 % for one layer; a wrong layout would have no correlation at all
    assert (exact.grad * through.grad).sum() / (exact.grad.norm() * through.grad.norm()) > cosine


def test_wrong_shapes_are_refused() -> None:
    program = float_convolutions((3, 8, 8), [square(4, 3)])
    contraction = program.module("layer0_convolve")
    assert isinstance(contraction, Contraction)
    wrong = contraction.replace(out_shape=(4, 8, 8))
    with pytest.raises(
        KanCompileError, match=r"layer 'layers.0': found output shape \(4, 8, 8\), expected \(4, 6, 6\)"
    ):
        check(program.replace_modules({"layer0_convolve": wrong}))


def test_one_dimension() -> None:
    program = float_convolutions(
        (4, 20), [Convolution(6, (5,), (2,), (2,), (1,)), Convolution(3, (3,), (1,), (1,), (1,))]
    )
    fused = FuseIndex()(rounded_by(tabulate(program)))
    x = calibration_inputs(program, 16, seed=2)
    assert signal_to_noise(program(x), fused(x)) > 33
    np.testing.assert_array_equal(run(emit(fused, {}), x), fused(x).numpy())
