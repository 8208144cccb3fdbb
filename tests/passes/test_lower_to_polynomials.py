"""The float lowering: what becomes a polynomial, what stays, and that the file computes what the model does."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import (
    Branch,
    BreakpointCells,
    Contraction,
    Expansion,
    Geometry,
    PolynomialExpansion,
    Program,
    UniformCells,
    check,
    show,
    to_channels_last,
)
from kancompile.passes.lower_to_polynomials import LowerToPolynomials
from kancompile.targets.onnx.export import emit
from tests.programs import integer_program
from tests.regions import adaptive_knots, branch, float_program, silu, spline, uniform_knots

SAMPLES = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def expand(*branches: Branch) -> Expansion:
    return Expansion((branches[0].position.shape[0],), branches)


def efficient_kan() -> Program:
    """Two layers of splines and SiLU, the second with knots of its own for every input."""
    return float_program([expand(spline(uniform_knots(6)), silu(6)), expand(silu(5), spline(adaptive_knots(5)))])


@functools.cache
def lowered_kan() -> Program:
    return LowerToPolynomials()(efficient_kan(), SAMPLES)


@functools.cache
def lowered_file() -> bytes:
    return emit(lowered_kan(), {})


def polynomials(program: Program) -> list[PolynomialExpansion]:
    modules = [program.module(target) for layer in program.layers() for target in layer.expansions]
    return [module for module in modules if isinstance(module, PolynomialExpansion)]


def inputs(count: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Inputs inside the grid, around it, and far outside."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.5, 3.0, 100.0])[torch.arange(count) % 3].reshape(-1, *[1] * len(shape))
    return torch.randn(count, *shape, generator=generator) * size


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def run_file(model: bytes, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.cat([torch.from_numpy(session.run(None, {"input": part.numpy()})[0]) for part in torch.split(x, 64)])


def test_layers_are_lowered_and_nothing_else_changes() -> None:
    program = efficient_kan()
    before, shown = program(SAMPLES), show(program)
    result = LowerToPolynomials()(program, SAMPLES)
    check(result)
    assert show(program) == shown
    assert torch.equal(program(SAMPLES), before)
    first, second = polynomials(result)
    assert isinstance(first.cells, UniformCells)
    assert isinstance(second.cells, BreakpointCells)
    assert len(result.notes) == 2
    assert "relative error" in result.notes[0]
    assert "degree" in show(result)
    for size in (0.5, 3.0, 100.0):
        x = SAMPLES * size
        assert relative(result(x), program(x)) < 1e-5


def test_the_second_run_changes_nothing() -> None:
    assert LowerToPolynomials()(lowered_kan(), SAMPLES) is lowered_kan()


@pytest.mark.slow
def test_equal_programs_give_equal_files() -> None:
    assert emit(LowerToPolynomials()(efficient_kan(), SAMPLES), {}) == lowered_file()


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_file_computes_what_the_program_does(count: int) -> None:
    x = inputs(count, (6,))
    assert relative(run_file(lowered_file(), x), lowered_kan()(x)) < 1e-6


def waves(n_in: int) -> Branch:
    """A branch that has no polynomial form."""
    frequencies = torch.arange(1.0, 4.0)
    return branch("waves", n_in, 3, lambda x, f: torch.cos(x.unsqueeze(-1) * f), frequencies)


def test_branches_are_separated_and_the_columns_follow() -> None:
    for branches in ([waves(6), spline(adaptive_knots(6))], [spline(adaptive_knots(6)), waves(6)]):
        program = float_program([expand(*branches)])
        result = LowerToPolynomials()(program, SAMPLES)
        check(result)
        (layer,) = result.layers()
        lowered, kept = (result.module(target) for target in layer.expansions)
        assert isinstance(lowered, PolynomialExpansion)
        assert lowered.branch_names == ("spline",)
        assert isinstance(kept, Expansion)
        assert [part.name for part in kept.branches] == ["waves"]
        x = inputs(99, (6,))
        assert relative(result(x), program(x)) < 3e-6
        assert relative(run_file(emit(result, {}), x), result(x)) < 1e-6
        assert LowerToPolynomials()(result, SAMPLES) is result


def test_an_expansion_that_two_layers_read() -> None:
    program = float_program([expand(waves(6), spline(adaptive_knots(6)))])
    root, graph = program.graph_module, program.graph_module.graph
    node = next(node for node in graph.nodes if node.target == "layer0_expand")
    generator = torch.Generator().manual_seed(5)
    other = Contraction("other", torch.randn(3, 66, generator=generator), torch.zeros(3), (3,))
    root.add_module("other_contract", other)
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        second = graph.call_module("other_contract", (node,))
        output.args = (graph.call_function(torch.cat, ([output.args[0], second], 1)),)
    program = Program(fx.GraphModule(root, graph), (6,))
    result = LowerToPolynomials()(program, SAMPLES)
    check(result)
    assert len({layer.expansions for layer in result.layers()}) == 1
    assert relative(result(SAMPLES), program(SAMPLES)) < 3e-6


def test_cheap_and_periodic_expansions_stay() -> None:
    for expansion, reason in ((expand(silu(6)), "cheaper"), (expand(waves(6)), "no straight line far from 0")):
        program = float_program([expansion])
        result = LowerToPolynomials()(program, SAMPLES)
        assert result.module("layer0_expand") is expansion
        assert reason in result.notes[0]
        assert LowerToPolynomials()(result, SAMPLES) is result


def test_what_does_not_fit_stays_with_the_reason() -> None:
    program = float_program([expand(spline(adaptive_knots(6)))])
    result = LowerToPolynomials(most_bytes=200)(program, SAMPLES)
    assert polynomials(result) == []
    assert "no polynomials of the degrees tried reach 1e-06 with 200 bytes" in result.notes[0]


def test_interpolated_tables_are_an_option() -> None:
    program = float_program([expand(spline(uniform_knots(6)), silu(6))])
    (table,) = polynomials(LowerToPolynomials(1e-4, degrees=(1,))(program, SAMPLES))
    (cubic,) = polynomials(LowerToPolynomials(1e-4, degrees=(3,))(program, SAMPLES))
    assert (table.degree, cubic.degree) == (1, 3)
    assert cubic.table_bytes < table.table_bytes / 5


def test_acos_of_tanh_never_reaches_the_runtime() -> None:
    """The runtime's tanh exceeds 1 near 8.3, and acos of that is NaN."""
    chebyshev = branch(
        "chebyshev", 6, 4, lambda x: torch.cos(torch.acos(torch.tanh(x)).unsqueeze(-1) * torch.arange(4))
    )
    program = float_program([expand(chebyshev)])
    result = LowerToPolynomials()(program, SAMPLES)
    assert len(polynomials(result)) == 1
    x = torch.linspace(-20, 20, 60_000).reshape(-1, 6)
    got = run_file(emit(result, {}), x)
    assert relative(got, program(x)) < 1e-5


@pytest.mark.parametrize(("exponents", "polynomial"), [((0.4, 0.7), True), ((1.0, 3.0), False)])
def test_fractional_powers_next_to_0_never_reach_the_runtime(exponents: tuple[float, ...], polynomial: bool) -> None:
    """The runtime's sigmoid is off by 1e-8 far below 0, and a root makes 1e-4 of that."""
    powers = branch("powers", 6, 2, lambda x, p: torch.sigmoid(x).unsqueeze(-1) ** p, torch.tensor(exponents))
    program = float_program([expand(powers)])
    result = LowerToPolynomials()(program, SAMPLES)
    assert len(polynomials(result)) == polynomial
    x = torch.linspace(-40, 40, 6000).reshape(-1, 6)
    assert relative(run_file(emit(result, {}), x), program(x)) < 1e-5


def test_unsafe_and_unbounded_is_refused() -> None:
    unsafe = branch("angle", 6, 1, lambda x: x * x * torch.acos(torch.tanh(x)))
    with pytest.raises(KanCompileError, match=r"layer 'layers.0': branch 'angle' runs acos at the edge .* with clamp"):
        LowerToPolynomials()(float_program([expand(unsafe)]), SAMPLES)


def test_integer_programs_and_bad_options_are_refused() -> None:
    with pytest.raises(KanCompileError, match="found integer weights, expected a float contraction"):
        LowerToPolynomials()(integer_program(), SAMPLES)
    with pytest.raises(KanCompileError, match=r"found tolerance 0\.0"):
        LowerToPolynomials(tolerance=0.0)
    with pytest.raises(KanCompileError, match=r"found degrees \(0,\)"):
        LowerToPolynomials(degrees=(0,))
    bad = torch.full((2, 6), float("nan"))
    with pytest.raises(KanCompileError, match="expected finite ones"):
        LowerToPolynomials()(efficient_kan(), bad)


class Pixelwise(nn.Module):
    """A region of a convolution: reads channels first, yields channels last."""

    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__()
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        return self.region(to_channels_last(x).reshape(-1, 4)).reshape(x.shape[0], -1)


@pytest.mark.parametrize("knots", [uniform_knots(4), adaptive_knots(4)], ids=["uniform", "adaptive"])
def test_convolutions_with_groups(knots: Tensor) -> None:
    branches = []
    for part in (waves(4), spline(knots)):
        position = torch.arange(5 * 6 * 4 * part.k).reshape(5, 6, 4, part.k)
        assert part.region is not None
        branches.append(Branch(part.name, fx.symbolic_trace(Pixelwise(part.region)), position))
    expansion = Expansion((4, 5, 6), branches, channels_first=True)
    generator = torch.Generator().manual_seed(3)
    geometry = Geometry((1, 2), (1, 0), (1, 1), groups=2)
    out_shape = (6, *geometry.out_size((5, 6), (3, 2)))
    weight = torch.randn(6, 4 * expansion.k // 2, 3, 2, generator=generator)
    contraction = Contraction("conv", weight, torch.randn(6, generator=generator), out_shape, geometry)
    graph = fx.Graph()
    value = graph.call_module("conv", (graph.call_module("expand", (graph.placeholder("x"),)),))
    graph.output(value)
    program = Program(fx.GraphModule({"expand": expansion, "conv": contraction}, graph), (4, 5, 6))
    check(program)
    x = inputs(30, (4, 5, 6))
    result = LowerToPolynomials()(program, x)
    check(result)
    (lowered,) = polynomials(result)
    assert lowered.n_tables == (1 if torch.equal(knots[0], knots[1]) else 4)
    assert relative(result(x), program(x)) < 3e-6
    assert relative(run_file(emit(result, {}), x), result(x)) < 1e-6


def test_more_tokens_than_one() -> None:
    part = spline(uniform_knots(12))
    positions = part.position.reshape(3, 4, -1)
    expansion = Expansion((3, 4), [Branch("spline", fx.symbolic_trace(Flat(part)), positions)])
    generator = torch.Generator().manual_seed(0)
    contraction = Contraction("tokens", torch.randn(5, 32, generator=generator), torch.zeros(5), (3, 5))
    graph = fx.Graph()
    graph.output(graph.call_module("contract", (graph.call_module("expand", (graph.placeholder("x"),)),)))
    program = Program(fx.GraphModule({"expand": expansion, "contract": contraction}, graph), (3, 4))
    x = inputs(30, (3, 4))
    result = LowerToPolynomials()(program, x)
    assert len(polynomials(result)) == 1
    assert relative(result(x), program(x)) < 3e-6
    assert np.isfinite(run_file(emit(result, {}), x).numpy()).all()


class Flat(nn.Module):
    def __init__(self, part: Branch) -> None:
        super().__init__()
        assert part.region is not None
        self.region = part.region

    def forward(self, x: Tensor) -> Tensor:
        return self.region(x.reshape(-1, 12))
