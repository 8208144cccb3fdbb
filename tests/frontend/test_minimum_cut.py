"""The minimum vertex cut against exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from kancompile.frontend.layers.minimum_cut import minimum_cut


def separates(edges: list[tuple[int, int]], sources: list[int], sink: int, cut: set[int]) -> bool:
    reached = {source for source in sources if source not in cut}
    grew = True
    while grew:
        new = {head for tail, head in edges if tail in reached and head not in cut} - reached
        reached |= new
        grew = bool(new)
    return sink not in reached


@settings(max_examples=60, deadline=None)
@given(
    edges=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)).filter(lambda e: e[0] < e[1]), max_size=14),
    sizes=st.lists(st.integers(0, 4), min_size=6, max_size=6),
    fixed=st.sets(st.integers(2, 5), max_size=2),
)
def test_cut_is_minimal(edges: list[tuple[int, int]], sizes: list[int], fixed: set[int]) -> None:
    capacity = {vertex: size for vertex, size in enumerate(sizes) if vertex not in fixed}
    found = minimum_cut(edges, [0, 1], 6, capacity)
    assert separates(edges, [0, 1], 6, set(found))
    vertices = list(capacity)
    best = min(
        sum(capacity[v] for v in subset)
        for size in range(len(vertices) + 1)
        for subset in itertools.combinations(vertices, size)
        if separates(edges, [0, 1], 6, set(subset))
    )
    assert sum(capacity[vertex] for vertex in found) == best


def test_ties_go_to_the_sources() -> None:
    assert minimum_cut([(0, 1), (1, 2), (2, 3)], [0], 3, {0: 5, 1: 5, 2: 5}) == [0]
    assert minimum_cut([(0, 2), (1, 2), (2, 3)], [0, 1], 3, {0: 4, 1: 4, 2: 7}) == [2]
