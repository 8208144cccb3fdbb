import itertools
import random

import pytest

from kancompile.errors.exceptions import KanCompileError
from kancompile.passes.bit_allocation.allocation import Choice, allocate, pareto_front


def random_options(seed, layers=5):
    draw = random.Random(seed)
    options = {}
    for i in range(layers):
        size, base = draw.randint(50, 500), draw.random() ** 4
        options[f"layers.{i}"] = [
            Choice(bits, size * bits // 8 + draw.randint(0, 9), base * 4.0**-bits, draw.uniform(0.5, 1.5) * bits * 1e-4)
            for bits in (2, 3, 4, 8)
        ]
    return options


def everything(options):
    return [
        (sum(c.bytes for c in picked), sum(c.sensitivity for c in picked), sum(c.latency for c in picked))
        for picked in itertools.product(*options.values())
    ]


@pytest.mark.parametrize("seed", range(10))
def test_allocation_equals_exhaustive_search_at_every_budget(seed):
    options = random_options(seed)
    totals = everything(options)
    smallest, largest = min(total[0] for total in totals), max(total[0] for total in totals)
    for step in range(12):
        budget = smallest + (largest - smallest) * step // 11
        expected = min((cost, size) for size, cost, _ in totals if size <= budget)
        found = allocate(options, budget)
        assert found.sensitivity == pytest.approx(expected[0], rel=1e-12)
        assert found.bytes == expected[1]
        assert set(found.choices) == set(options)


@pytest.mark.parametrize("seed", range(10))
def test_latency_budget_equals_exhaustive_search(seed):
    options = random_options(seed, layers=4)
    totals = everything(options)
    times = sorted(total[2] for total in totals)
    sizes = sorted(total[0] for total in totals)
    for share in (0.2, 0.5, 0.8):
        max_bytes, max_latency = sizes[int(share * len(sizes))], times[int(share * len(times))]
        fitting = [cost for size, cost, time in totals if size <= max_bytes and time <= max_latency]
        if not fitting:
            with pytest.raises(KanCompileError, match="latency budget"):
                allocate(options, max_bytes, max_latency)
            continue
        found = allocate(options, max_bytes, max_latency)
        assert found.bytes <= max_bytes
        assert found.latency <= max_latency * (1 + 1e-9)
        # the solver works in units of the largest sensitivity with tolerance 1e-6
        unit = max(choice.sensitivity for choices in options.values() for choice in choices)
        assert found.sensitivity == pytest.approx(min(fitting), abs=2e-6 * unit)


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_holds_exactly_the_allocations_that_nothing_beats(seed):
    options = random_options(seed, layers=4)
    pairs = {(size, cost) for size, cost, _ in everything(options)}
    expected = sorted(p for p in pairs if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in pairs))
    front = pareto_front(options)
    assert [a.bytes for a in front] == [size for size, _ in expected]
    assert [a.sensitivity for a in front] == pytest.approx([cost for _, cost in expected], rel=1e-12)


def test_budget_below_the_smallest_size_says_what_is_reachable():
    options = {"a": [Choice(2, 100, 1.0), Choice(8, 400, 0.1)], "b": [Choice(2, 10, 1.0)]}
    assert allocate(options, 110).choices["a"].bits == 2
    with pytest.raises(KanCompileError, match="size budget 109 bytes, but the smallest reachable size is 110 bytes"):
        allocate(options, 109)


def test_latency_budget_below_the_fastest_says_what_is_reachable():
    options = {"a": [Choice(2, 100, 1.0, 0.002), Choice(8, 400, 0.1, 0.001)]}
    assert allocate(options, 400, 0.0015).choices["a"].bits == 8
    with pytest.raises(KanCompileError, match=r"within 200 bytes the smallest reachable latency is 0\.002 s"):
        allocate(options, 200, 0.0015)


def test_incomplete_options_are_refused():
    with pytest.raises(KanCompileError, match="found no layer"):
        pareto_front({})
    with pytest.raises(KanCompileError, match="layer 'a': no choice of bits"):
        allocate({"a": []}, 10)
    with pytest.raises(KanCompileError, match="layer 'a': sensitivity at 4 bits is nan"):
        allocate({"a": [Choice(4, 10, float("nan"))]}, 10)
    with pytest.raises(KanCompileError, match=r"layers \['a'\] have no measured latency"):
        allocate({"a": [Choice(4, 10, 1.0)]}, 10, 1.0)
