"""The proof of int16 pairs against a saturating sum written out in loops, and against a processor that saturates."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kancompile.ir import IntegerContraction, Program, TableExpansion
from kancompile.passes.fuse_index import FuseIndex
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.passes.round_weights import RoundingOptions, RoundWeights
from kancompile.passes.round_weights.pair_products import Int16Proof, layer_pairs, prove, prove_layer
from kancompile.passes.rounding_methods import METHODS
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from kancompile.runtimes.emulation import X86, run_emulated
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from kancompile.targets.onnx.arrange_tables import arrange_tables
from kancompile.targets.onnx.export import emit
from tests import convolution_programs, programs
from tests.convolution_programs import Convolution, float_convolutions, integer_convolutions, square
from tests.programs import integer_program
from tests.saturation import adds_products_exactly


@pytest.fixture(autouse=True)
def _codes_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw codes up to 127 on every processor: what overflows is what is looked for here."""
    for module in (programs, convolution_programs):
        monkeypatch.setattr(module, "code_limit", lambda bits: 1 << (bits - 1))


def column_sources(tables: list[TableExpansion]) -> list[tuple[int, int, np.ndarray]]:
    """List ``(input, column, table)`` for every column of a linear layer, ``table`` being the rows an input can meet."""
    found = []
    for number, table in enumerate(tables):
        for i in range(table.n_in):
            begin = 0 if table.first_row is None else int(table.first_row[i])
            rows = table.table[begin : begin + table.index.levels].numpy().astype(int)
            found += [((number, i), k, rows) for k in range(table.k)]
    return found


def slow_sum(first: tuple, second: tuple, w0: int, w1: int, outside: int | None, same_tap: bool) -> int:
    """Return the extreme of ``q0 w0 + q1 w1`` over all codes that can meet, by magnitude."""
    if first[0] == second[0] and same_tap:
        pairs = list(zip(first[2][:, first[1]], second[2][:, second[1]], strict=True))
        pairs += [] if outside is None else [(outside, outside)]
    else:
        extra = [] if outside is None else [outside]
        ends = [[*(f(s[2][:, s[1]]) for f in (min, max)), *extra] for s in (first, second)]
        pairs = list(itertools.product(*ends))
    return max((int(a) * w0 + int(b) * w1 for a, b in pairs), key=abs)


def linear_case(program: Program, number: int = 0) -> tuple[IntegerContraction, list[TableExpansion]]:
    layer = program.layers()[number]
    contraction = program.module(layer.contraction)
    assert isinstance(contraction, IntegerContraction)
    return contraction, [program.module(target) for target in layer.expansions]  # type: ignore[misc]


@pytest.mark.parametrize(
    "case", [{}, {"k": 4}, {"tables": 3}, {"groups": 2}, {"groups": 3, "k": 5}, {"widths": (5, 3)}]
)
def test_linear_proof_equals_enumeration(case: dict) -> None:
    contraction, tables = linear_case(integer_program(**{"widths": (6, 5), "levels": (32,)} | case))
    sources = column_sources(tables)
    sums, start = [], 0
    for weight in contraction.weights:
        own = range(start, start + len(weight))
        orders = [list(own)]
        if len(contraction.weights) == 1 and tables[0].k <= 3:  # or functions major, one expansion behind the other
            orders.append(sorted(own, key=lambda c: (sources[c][0][0], sources[c][1], sources[c][0][1])))
        for first, second in (pair for order in orders for pair in zip(order[::2], order[1::2], strict=False)):
            for w0, w1 in zip(weight[first - start].tolist(), weight[second - start].tolist(), strict=True):
                sums.append(slow_sum(sources[first], sources[second], w0, w1, None, True))
        start += len(weight)
    proof = prove(contraction, tables)
    assert proof.pairs == len(sums)
    assert proof.overflowing == sum(abs(value) > 32767 for value in sums)
    assert proof.overflowing > 0
    # opposite signs never reach int16, so they are not looked at any closer than their single products
    assert proof.largest == max(abs(value) for value in sums)


def test_a_single_column_has_no_pairs() -> None:
    contraction, tables = linear_case(integer_program(widths=(1, 5), k=1))
    assert prove(contraction, tables) == Int16Proof(0, 0, 0)
    (pairs,) = layer_pairs(contraction, tables)
    weight = contraction.weights[0].T.contiguous()
    assert [len(found) for found in pairs.overflows(weight)] == [0, 0, 0]
    low, high = pairs.limits(weight)
    assert bool((low == -127).all() & (high == 127).all())


@pytest.mark.parametrize(
    "layer",
    [
        square(4, 3, padding=1),
        square(4, 2),
        square(4, 3, padding=1, groups=2),
        square(3, 1),
        Convolution(4, (3,), (1,), (1,), (1,), features=(2, 3)),
        Convolution(4, (3, 2), (1, 1), (1, 0), (1, 1), groups=2, features=(2, 3)),
    ],
)
@pytest.mark.parametrize("channels", [4, 3])
def test_convolution_proof_equals_enumeration(layer: Convolution, channels: int) -> None:
    if channels % layer.groups:
        channels = 6
    program = integer_convolutions((channels, *[6] * len(layer.kernel)), [layer], levels=16, tables=2, zero_point=40)
    found = program.layers()[0]
    contraction = program.module(found.contraction)
    assert isinstance(contraction, IntegerContraction)
    tables = [program.module(target) for target in found.expansions]
    columns = column_sources(tables)  # type: ignore[arg-type]
    by_table = [[s for s in columns if s[0][0] == number] for number in range(len(tables))]
    outside = 40 if layer.geometry.pads else None
    sums = []
    for group in range(layer.groups):
        own = [s for part in by_table for s in part[group * len(part) // layer.groups :][: len(part) // layer.groups]]
        weight = contraction.matrix.chunk(layer.groups)[group].flatten(2)  # [n_out, c, taps]
        orders = [list(range(len(own)))]
        if layer.groups == 1:  # or in planes: functions major, channels minor, one expansion behind the other
            planes = sorted(orders[0], key=lambda c: (own[c][0][0], own[c][1], own[c][0][1]))
            orders.append(planes + [-1] * (len(planes) % 2))
        rows = [[(tap, c) for tap in range(weight.shape[2]) for c in order] for order in orders]
        for (tap0, c0), (tap1, c1) in (pair for row in rows for pair in zip(row[::2], row[1::2], strict=False)):
            for o in range(len(weight)):
                w0 = int(weight[o, c0, tap0])
                if c1 < 0:  # a constant column of weight up to 64
                    largest = max([int(own[c0][2][:, own[c0][1]].max()), *([] if outside is None else [outside])])
                    sums.append(abs(w0) * largest + (64 * 255 if w0 else 0))
                else:
                    sums.append(slow_sum(own[c0], own[c1], w0, int(weight[o, c1, tap1]), outside, tap0 == tap1))
    proof = prove(contraction, tables)  # type: ignore[arg-type]
    assert proof.pairs == len(sums)
    assert proof.overflowing == sum(abs(value) > 32767 for value in sums) > 0


def test_orders_of_the_columns_are_those_of_files() -> None:
    # what is emitted computes the same products in an order that the proof pairs them in
    program = integer_convolutions((4, 6, 6), [square(5, 3, padding=1)], zero_point=40)
    layer = program.layers()[0]
    contraction = program.module(layer.contraction)
    tables = [program.module(target) for target in layer.expansions]
    pairs = layer_pairs(contraction, tables)[0]  # type: ignore
    weight = contraction.weight.flatten(1)  # type: ignore
    half = len(pairs.columns) // 2
    for start, emitted in ((0, program), (half, arrange_tables(program))):
        found = emitted.module(layer.contraction).weight.flatten(2).movedim(1, 2).flatten(1)  # type: ignore  # taps major
        places = torch.arange(start, start + half)
        for number in range(5):
            ours = pairs.weights(weight, torch.full((half,), number), places)
            assert torch.equal(ours.flatten(), found[number].to(torch.int64))


def test_a_convolution_of_full_codes_is_exact_in_both_orders() -> None:
    """Rows whose codes are all large, as far outside of the calibrated range, reach the largest sums in either order."""
    program = TabulateExpansions(lambda name: TableOptions(256))(
        float_convolutions((12, 6, 6), [square(4, 2)]),
        torch.randn(40, 12, 6, 6, generator=torch.Generator().manual_seed(0)),
    )
    layer = program.layers()[0]
    table = program.node(layer.expansions[0], TableExpansion)
    codes = table.table.clone()
    codes[0] = 255
    program = program.replace_modules({layer.expansions[0]: table.replace(table=codes)})
    x = torch.randn(40, 12, 6, 6, generator=torch.Generator().manual_seed(1))
    options = RoundingOptions(METHODS["uniform"], "uniform", int16_pairs=True)
    safe = QuantizeOutputs()(FuseIndex()(RoundWeights(lambda name: options)(program, x)), x)
    assert any("int16" in note for note in safe.notes)
    far = torch.cat([x[:8], torch.full_like(x[:8], -100.0)])
    for target in ("ort-cpu", "qnn"):
        session = RuntimeModel(TARGETS[target].emit(safe, {}))
        found = np.concatenate([session.run(one[None].numpy())[0] for one in far])
        np.testing.assert_array_equal(found, safe(far).numpy())


@pytest.mark.parametrize("seed", range(3))
def test_any_codes_of_a_convolution_within_the_limits_fit(seed: int) -> None:
    program = integer_convolutions((4, 6, 6), [square(5, 2)], zero_point=40)
    layer = program.layers()[0]
    tables = [program.module(target) for target in layer.expansions]
    pairs = layer_pairs(program.module(layer.contraction), tables)[0]  # type: ignore
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (5, int(pairs.columns.max()) + 1), generator=generator, dtype=torch.int8)
    while len(pairs.overflows(codes)[0]):
        output, pair, _ = pairs.overflows(codes)
        codes[output, pairs.columns[pair, 0]] //= 2
    low, high = pairs.limits(codes)
    assert bool(((codes >= low) & (codes <= high)).all())
    for _ in range(20):
        share = torch.randint(0, 3, codes.shape, generator=generator) / 2
        assert not len(pairs.overflows((low + share * (high - low)).round().to(torch.int8))[0])


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_seven_bits_always_fit(bits: int) -> None:
    program = integer_program(weight_bits=bits, widths=(20, 30, 10))
    for layer in program.layers():
        proof = prove_layer(program, layer)
        assert proof is not None
        assert proof.holds
        assert proof.largest <= 255 * 64 * 2


def single_pairs() -> Program:
    """Build a layer of 16 columns whose output ``o`` reads columns ``o`` and ``o + 1`` only, all codes being 255."""
    program = integer_program(widths=(4, 8), levels=(16,), k=4)
    layer = program.layers()[0]
    contraction, tables = linear_case(program)
    weight = torch.zeros(16, 8, dtype=torch.int8)
    weight[torch.arange(8), torch.arange(8)] = 127
    weight[torch.arange(8) + 1, torch.arange(8)] = 127
    full = tables[0].replace(table=torch.full_like(tables[0].table, 255))
    return program.replace_modules(
        {
            layer.expansions[0]: full,
            layer.contraction: contraction.replace(codes=weight.T),
        }
    )


def test_room_is_exact() -> None:
    contraction, tables = linear_case(integer_program(widths=(6, 40), levels=(64,), k=5))
    pairs = layer_pairs(contraction, tables)[0]
    weight = torch.cat(contraction.weights).T
    output, pair, _ = pairs.overflows(weight)
    size = pairs.weights(weight, output, pair).abs()
    for which in (0, 1):
        room = pairs.room(pair, size, which)
        changed = size.clone()
        changed[:, which] = room
        assert bool((pairs.reach(pair, changed) <= 32767).all())
        changed[:, which] = room + 1
        assert bool((pairs.reach(pair, changed) > 32767)[room < 127].all())


@pytest.mark.parametrize("seed", range(4))
def test_any_codes_within_the_limits_fit(seed: int) -> None:
    contraction, tables = linear_case(integer_program(widths=(9, 40), levels=(32,), k=3))
    pairs = layer_pairs(contraction, tables)[0]
    generator = torch.Generator().manual_seed(seed)
    shape = contraction.weights[0].T.shape
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    output, pair, _ = pairs.overflows(codes)
    codes[output, pairs.columns[pair, 0]] //= 2
    codes[output, pairs.columns[pair, 1]] //= 2
    assert not len(pairs.overflows(codes)[0])
    low, high = pairs.limits(codes)
    assert bool(((codes >= low) & (codes <= high)).all())
    for _ in range(20):
        share = torch.randint(0, 3, shape, generator=generator) / 2  # ends and middle
        moved = (low + share * (high - low)).round().to(torch.int8)
        assert not len(pairs.overflows(moved)[0])


@pytest.mark.needs("ort-x86-haswell")
def test_pairs_are_those_that_a_processor_without_vnni_joins(tmp_path: Path) -> None:
    program = single_pairs()
    x = np.linspace(-3, 3, 32, dtype=np.float32).reshape(8, 4)
    expected = program(torch.from_numpy(x)).numpy()
    model = tmp_path / "model.onnx"
    model.write_bytes(emit(program, {}))
    if adds_products_exactly():
        np.testing.assert_array_equal(RuntimeModel(model).run(x)[0], expected)
    wrong = (run_emulated(X86["haswell"], model, x) != expected).any(0)
    assert wrong.tolist() == [True, False] * 4
    contraction, tables = linear_case(program)
    output, _, _ = layer_pairs(contraction, tables)[0].overflows(contraction.weights[0].T)
    assert output.tolist() == [0, 2, 4, 6]
