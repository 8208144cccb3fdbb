"""Minimum vertex cut of a directed graph, by augmenting paths."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Vertex = TypeVar("Vertex", bound=Hashable)
Port = tuple[int, bool]  # vertex number, and whether the port where its edges leave


def minimum_cut(
    edges: Iterable[tuple[Vertex, Vertex]],
    sources: Sequence[Vertex],
    sink: Vertex,
    capacity: Mapping[Vertex, int],
) -> list[Vertex]:
    """Find the cheapest set of vertices that separates the sources from the sink, the one nearest to the sources.

    Every vertex is split into an arc from its entry to its exit that carries its capacity (Ford and Fulkerson,
    *Flows in Networks*, 1962, chapter I.11); shortest augmenting paths (Edmonds and Karp, 1972) find a maximum flow, and
    the saturated arcs on the border of what the sources still reach are the cut.

    Args:
        edges: arcs of unlimited capacity.
        sources: vertices that flow enters; they may be cut.
        sink: vertex that it leaves; it is never cut.
        capacity: cost of cutting a vertex; vertices without an entry are never cut.

    Returns:
        The cut, in the order in which ``edges`` and ``sources`` mention its vertices.
    """
    number: dict[Vertex, int] = {}
    arcs = list(edges)
    for vertex in (*sources, *(end for arc in arcs for end in arc), sink):
        number.setdefault(vertex, len(number))
    unlimited = 1 + sum(capacity.values())
    residual: dict[Port, dict[Port, int]] = {(i, side): {} for i in number.values() for side in (False, True)}

    def connect(start: Port, end: Port, amount: int) -> None:
        residual[start][end] = residual[start].get(end, 0) + amount
        residual[end].setdefault(start, 0)

    for vertex, i in number.items():
        connect((i, False), (i, True), unlimited if vertex == sink else capacity.get(vertex, unlimited))
    for start, end in arcs:
        connect((number[start], True), (number[end], False), unlimited)
    entries = [(number[vertex], False) for vertex in sources]
    goal = (number[sink], False)

    while True:
        parent: dict[Port, Port | None] = dict.fromkeys(entries)
        queue = deque(entries)
        while queue and goal not in parent:
            here = queue.popleft()
            for there, amount in residual[here].items():
                if amount > 0 and there not in parent:
                    parent[there] = here
                    queue.append(there)
        if goal not in parent:
            return [vertex for vertex, i in number.items() if (i, False) in parent and (i, True) not in parent]
        path = [goal]
        while (previous := parent[path[-1]]) is not None:
            path.append(previous)
        steps = list(zip(path[1:], path[:-1], strict=True))
        pushed = min(residual[tail][head] for tail, head in steps)
        assert pushed < unlimited, "the sources reach the sink without passing a vertex that may be cut"
        for tail, head in steps:
            residual[tail][head] -= pushed
            residual[head][tail] += pushed
