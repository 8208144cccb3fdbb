"""Emitted C against the simulation, bit for bit, and the simulation's runtime against both."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from examples.zoo import efficient_kan, kagn_conv
from kancompile.compiler.compile import compile
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import GroupMultiplier, IntegerContraction, Program, TableExpansion, check
from kancompile.runtimes.c99 import RUNTIME
from kancompile.targets.c99 import emit, facts
from kancompile.targets.onnx.export import emit as emit_onnx
from tests.compiled_kan import make_inputs, make_model
from tests.convolution_programs import integer_convolutions, square
from tests.programs import float_program, integer_program
from tests.runtimes.exactness import PROGRAMS, probing_inputs, simulated_outputs
from tests.targets.c_programs import STRICT, UNDEFINED, WORDS, build, evaluate, write
from tests.targets.test_convolutions import CASES as CONVOLUTIONS
from tests.targets.test_ort_cpu import CASES as LINEAR
from tests.targets.test_ort_cpu import inputs, run

WIDTHS = [{"weight_bits": bits, "widths": (9, 21, 3)} for bits in range(2, 9)]
SPECIAL = [
    {"widths": (600, 40, 3), "levels": (64, 256), "k": 9},  # sums beyond 2^24, where float32 rounds them
    {"widths": (5, 4, 3), "k": 40},  # more functions of an input than a lane has room for
    {"groups": 4, "levels": (1024, 4096)},
    {"groups": 2, "levels": (256, 256), "tables": 2},
]


def identifier(case: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in case.items()) or "plain"


@pytest.mark.parametrize("case", [*LINEAR, *WIDTHS, *SPECIAL], ids=identifier)
@pytest.mark.needs("gcc")
def test_linear_layers_equal_simulation_bit_for_bit(case: dict, tmp_path: Path) -> None:
    program = integer_program(**case)
    check(program)
    x = inputs(program)
    expected = program(x).numpy()
    write(program, tmp_path)
    for words in WORDS:
        found = evaluate(build(tmp_path, ["-std=c99", "-O1", *UNDEFINED, words]), x)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.needs("gcc")
def test_convolutions_equal_simulation_bit_for_bit(case: str, tmp_path: Path) -> None:
    shape, layers, options = CONVOLUTIONS[case]
    program = integer_convolutions(shape, layers, **options)
    x = inputs(program, 40)
    expected = program(x).numpy()
    write(program, tmp_path)
    words = WORDS[len(case) % 2]  # either kind of word, half of the cases each
    np.testing.assert_array_equal(evaluate(build(tmp_path, ["-std=c99", "-O1", *UNDEFINED, words]), x), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.needs("gcc")
def test_5000_inputs_equal_onnx_runtime(bits: int, tmp_path: Path) -> None:
    chain = [square(6, 3, padding=1), square(5, 3, stride=2)]
    for number, program in enumerate(
        [
            _with_ties(integer_program((24, 16, 5), k=5, weight_bits=bits)),
            integer_program((24, 16, 5), levels=(256, 1024), k=5, weight_bits=bits),
            integer_convolutions((2, 7, 7), chain, zero_point=9, weight_bits=bits),
        ]
    ):
        x = _hard_inputs(program, 5000)
        folder = tmp_path / str(number)
        folder.mkdir()
        found = evaluate(build(write(program, folder), ["-std=c99", "-O2"]), x)
        np.testing.assert_array_equal(found, run(emit_onnx(program, {}), x))


def _hard_inputs(program: Program, n: int) -> torch.Tensor:
    """Draw a third each: ties between two rows, inputs far outside the table, inputs all over it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *program.input_shape, generator=generator) * 4.4 - 2.2
    step = 4.0 / 255
    x[: n // 3] = (torch.floor(x[: n // 3] / step) + 0.5) * step
    x[-n // 3 :] *= 10.0 ** torch.randint(0, 30, x[-n // 3 :].shape, generator=generator)
    return x


def _with_ties(program: Program) -> Program:
    """Make a hidden layer's factors powers of two, so that its sums fall exactly between two rows all the time."""
    first = program.module("layer0_contract")
    assert isinstance(first, IntegerContraction)
    assert first.output is not None
    powers = 2.0 ** -(10 + torch.arange(first.n_out) % 4)
    scale = torch.tensor(first.output.scale, dtype=torch.float32) * powers
    tied = first.replace(scale=scale[None])
    return program.replace_modules({"layer0_contract": tied})


@pytest.mark.needs("gcc")
def test_infinite_inputs_take_the_outermost_rows(tmp_path: Path) -> None:
    program = integer_program()
    x = torch.full((2, 6), torch.inf)
    x[1] = -torch.inf
    found = evaluate(build(write(program, tmp_path), ["-std=c99", "-O2"]), x)
    np.testing.assert_array_equal(found, program(torch.tensor([[9.0] * 6, [-9.0] * 6])).numpy())


@pytest.mark.needs("gcc")
def test_largest_is_the_largest_output(tmp_path: Path) -> None:
    for number, program in enumerate(
        [
            integer_program((6, 5, 9)),
            integer_program((6, 5, 9), groups=2),
            integer_convolutions((3, 5, 5), [square(4, 3)]),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(program, folder)
        text = (folder / "program.c").read_text()
        check_it = "if (y[kan_model_largest(&state)] < largest(y)) return 7;"
        helper = (
            "static float largest(const float *y) { float m = y[0]; "
            "for (uint32_t i = 1; i < KAN_MODEL_OUTPUTS; i++) m = y[i] > m ? y[i] : m; return m; }"
        )
        text = text.replace("int main", helper + "\nint main").replace("if (fwrite", check_it + "\n        if (fwrite")
        (folder / "program.c").write_text(text)
        evaluate(build(folder, ["-std=c99", "-O1"]), inputs(program))


def _with_function(program: Program, after: str, functions: list) -> Program:
    """Insert ATen calls behind a module of a program."""
    copied = program.replace_modules({})
    graph = copied.graph_module.graph
    node = next(node for node in graph.nodes if node.target == after)
    users = list(node.users)
    value: fx.Node = node
    for function, *arguments in functions:
        with graph.inserting_after(value):
            value = graph.call_function(function, (value, *arguments))
    for user in users:
        user.replace_input_with(node, value)
    copied.graph_module.recompile()
    return copied


aten = torch.ops.aten


@pytest.mark.parametrize(
    "arguments",
    [
        ([2, 2],),
        ([3, 2], [2, 1]),
        ([3, 3], [2, 2], [1, 1]),
        ([2, 2], [2, 2], [0, 0], [2, 2]),
        ([3, 3], [2, 2], [0, 0], [1, 1], True),
    ],
)
@pytest.mark.needs("gcc")
def test_max_pooling(arguments: tuple, tmp_path: Path) -> None:
    program = integer_convolutions((3, 10, 9), [square(5, 3, padding=1)], zero_point=7)
    pool = (aten.max_pool2d_with_indices.default, *arguments)
    pooled = _with_function(program, "layer0_convolve", [pool, (operator.getitem, 0)])
    x = inputs(pooled, 30)
    found = evaluate(build(write(pooled, tmp_path), ["-std=c99", "-O1", *UNDEFINED]), x)
    np.testing.assert_array_equal(found, pooled(x).numpy())


@pytest.mark.needs("gcc")
def test_functions_of_codes_are_tables(tmp_path: Path) -> None:
    # the sine is no increasing function: the largest code of a window is not that of the largest value
    for number, functions in enumerate(
        [
            [(aten.sin.default,), (aten.max_pool2d_with_indices.default, [2, 2]), (operator.getitem, 0)],
            [(aten.mul.Tensor, 3.0), (aten.sin.default,)],
        ]
    ):
        program = integer_convolutions((3, 8, 8), [square(5, 3, padding=1), square(4, 3)], fused=False, zero_point=7)
        for after in ("layer0_convolve", "layer1_convolve"):
            changed = _with_function(program, after, functions)
            folder = tmp_path / f"{number}{after}"
            folder.mkdir()
            if number == 0 and after == "layer0_convolve":
                changed = _with_function(
                    program, "layer1_convolve", functions
                )  # the shape of what follows would change
            x = inputs(changed, 30)
            found = evaluate(build(write(changed, folder), [*STRICT, *UNDEFINED]), x)
            np.testing.assert_array_equal(found, changed(x).numpy())
            assert ("kan_codes" in (folder / "model.c").read_text()) == ("layer1" in after or number == 0)


class SmallNetwork(nn.Module):
    """Convolutions with an activation and a pooling between them, flattened into a linear KAN."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = kagn_conv.KAGNConv2d(1, 4, 3, generator, padding=1)
        self.second = kagn_conv.KAGNConv2d(4, 6, 3, generator, stride=2)
        self.head = efficient_kan.KAN([54, 5], generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x), 2)
        return self.head(self.second(x).flatten(1))


@pytest.mark.parametrize(("bits", "levels"), [(4, 255), (8, 1024), (8, None)])
@pytest.mark.needs("c99")
@pytest.mark.slow
def test_captured_network_equals_onnx_runtime(bits: int, levels: int | None, tmp_path: Path) -> None:
    model = SmallNetwork().eval()
    x = torch.randn(300, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    recipe = {"weight_bits": bits, "method": "uniform", "levels": levels}
    # a table behind a convolution has at most 256 rows, whatever was asked for, also behind a flattening
    compiled = compile(model, x[:60], target="c99", recipe=recipe)
    (tmp_path / "model.c").write_bytes(compiled.model_bytes)
    expected = run(compiled.session_bytes, x * 2)
    np.testing.assert_array_equal(RUNTIME.run(tmp_path / "model.c", (x * 2).numpy()), expected)
    assert np.abs(expected).max() > 0


@pytest.mark.needs("gcc")
def test_moving_operators_cost_nothing_or_a_copy(tmp_path: Path) -> None:
    program = integer_convolutions((3, 6, 6), [square(4, 3), square(5, 3)])
    for number, (after, functions, copies) in enumerate(
        [
            ("layer1_convolve", [(aten.permute.default, [0, 2, 3, 1]), (aten.reshape.default, [-1, 20])], 0),
            ("layer1_convolve", [(aten.slice.Tensor, 1, 1, 4)], 0),
            ("layer0_convolve", [(aten.permute.default, [0, 1, 3, 2])], 1),
        ]
    ):
        moved = _with_function(program, after, functions)
        folder = tmp_path / str(number)
        folder.mkdir()
        x = inputs(moved, 30)
        found = evaluate(build(write(moved, folder), [*STRICT, *UNDEFINED]), x)
        np.testing.assert_array_equal(found, moved(x).numpy())
        assert (folder / "model.c").read_text().count("static void kan_step") == copies


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("case", ["a layer used again", "MLP W8, values handed over"])
def test_inputs_between_two_rows_are_rounded_as_the_program_does(case: str, tmp_path: Path) -> None:
    program = PROGRAMS[case]()
    x = probing_inputs(program, 300)
    for flags in (STRICT, ("-O3", "-march=native", "-ffp-contract=fast")):  # products and sums that a compiler may join
        folder = tmp_path / flags[0]
        folder.mkdir()
        found = evaluate(build(write(program, folder), [*flags]), torch.from_numpy(x))
        np.testing.assert_array_equal(found, simulated_outputs(program, x))


def test_what_stays_in_float_is_refused_with_layer_reason_and_way_out() -> None:
    with pytest.raises(
        KanCompileError, match=r"'c99': layer 'layers\.0': Expansion computes in float.*lowering = \"table\""
    ):
        emit(float_program(), {})
    norm = _with_function(integer_program(fused=False), "layer0_contract", [(aten.tanh.default,)])
    with pytest.raises(KanCompileError, match=r"layer 'layers\.1': tanh computes in float.*'ort-cpu'"):
        emit(norm, {})
    two = integer_program().replace_modules({})
    output = next(node for node in two.graph_module.graph.nodes if node.op == "output")
    output.args = ((output.args[0], output.args[0]),)
    with pytest.raises(KanCompileError, match="expected one"):
        emit(two, {})
    bare = integer_convolutions((3, 8, 8), [square(8, 3)])
    bare = bare.replace_modules({"layer0_convolve": bare.module("layer0_convolve").unrounded()})
    with pytest.raises(
        KanCompileError, match=r"layer 'layers\.0': the output of the convolution has no 8-bit quantizer"
    ):
        emit(bare, {})
    program = integer_program((3, 5), (256,))
    graph = program.graph_module.graph
    x, first, *_ = graph.nodes
    with graph.inserting_before(first):
        first.args = (
            graph.call_function(aten.reshape.default, (x, [-1, 3])),
        )  # both rows of a sample behind each other
    with pytest.raises(
        KanCompileError, match=r"'layers\.0': parts of a sample are read as samples of their own.*'ort-cpu'"
    ):
        emit(replace(program, input_shape=(2, 3)), {})


@pytest.mark.parametrize("levels", [255, 1024])
@pytest.mark.needs("gcc")
def test_whole_factors_of_groups_are_stored_apart_from_narrow_codes(levels: int, tmp_path: Path) -> None:
    program = integer_program((12, 9, 5), levels=(64, levels), k=4, weight_bits=2)
    first = program.module("layer0_contract")
    assert isinstance(first, IntegerContraction)
    factors = torch.randint(1, 33, (3, 9), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    multiplier = GroupMultiplier(factors, (16, 18, 14))  # the second group ends within the functions of an input
    codes, scale = first.matrix * multiplier.of_column().T, torch.stack(first.scales) / 8
    grouped = first.replace(codes=codes, scale=scale, multiplier=multiplier)
    changed = program.replace_modules({"layer0_contract": grouped})
    check(changed)
    x = inputs(changed, 200)
    found = evaluate(build(write(changed, tmp_path), [*STRICT, *UNDEFINED]), x)
    np.testing.assert_array_equal(found, changed(x).numpy())
    np.testing.assert_array_equal(found, run(emit_onnx(changed, {}), x))
    plain, stored = (facts(emit(each, {}))["stored_bytes"] for each in (program, changed))
    assert stored - plain < 100, "two bits for each code, and a byte for each factor"


@pytest.mark.needs("c99")
def test_branches_with_indices_and_scales_of_their_own(tmp_path: Path) -> None:
    recipe = {"granularity": "branch", "weight_bits": 5, "method": "uniform"}
    compiled = compile(make_model(), make_inputs() * 4, target="c99", recipe=recipe)
    x = make_inputs(500, seed=2) * 6
    (tmp_path / "model.c").write_bytes(compiled.model_bytes)
    text = compiled.model_bytes.decode()
    assert "input1" in text
    assert "kan_layer1_scale" in text
    np.testing.assert_array_equal(RUNTIME.run(tmp_path / "model.c", x.numpy()), run(compiled.session_bytes, x))


@pytest.mark.needs("gcc")
def test_reads_real_values_behind_codes_of_another_quantizer(tmp_path: Path) -> None:
    program = integer_convolutions((3, 8, 8), [square(8, 3, padding=1), square(5, 3)], fused=False)
    table = program.module("layer1_expand0")
    assert isinstance(table, TableExpansion)
    index = type(table.index)(0.02, 60, 100)
    other = program.replace_modules(
        {"layer1_expand0": table.replace(index=index, input="real", table=table.table[:100])}
    )
    x = inputs(other, 40)
    found = evaluate(build(write(other, tmp_path), ["-std=c99", "-O1", *UNDEFINED]), x)
    np.testing.assert_array_equal(found, other(x).numpy())
