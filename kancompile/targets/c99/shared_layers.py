"""A layer that a model uses several times is one function in C, called with the arrays that each use reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kancompile.targets.c99.render_layer import LayerText, render_layer
from kancompile.targets.c99.steps import Array, Buffer, Contract, Read


@dataclass(frozen=True)
class Calls:
    """A layer in C, and its calls by the numbers of the steps that use it."""

    text: LayerText
    calls: dict[int, str]


def render_layers(steps: Sequence[Contract], place: Callable[[Buffer], str]) -> list[Calls]:
    """Write every layer once, in the order of its first use.

    Args:
        steps: the uses of all layers.
        place: gives the C expression of an array of row numbers.
    """
    groups: list[list[Contract]] = []
    for step in steps:
        same = next((group for group in groups if _are_one(group[0], step)), None)
        if same is None:
            groups.append([step])
        else:
            same.append(step)
    return [_rendered(group, place) for group in groups]


def _rendered(uses: Sequence[Contract], place: Callable[[Buffer], str]) -> Calls:
    first = uses[0]
    if len(uses) == 1:
        return Calls(render_layer(first, place), {first.number: f"kan_layer{first.number}(state);"})
    stores = {store.key: store for use in uses for store in use.stores}
    reads = [replace(read, buffer=replace(read.buffer, name=f"read{n}")) for n, read in enumerate(first.reads)]
    written = [replace(store, buffer=replace(store.buffer, name=f"to{n}")) for n, store in enumerate(stores.values())]
    keeps = any(use.keeps_sums for use in uses)
    one = replace(first, reads=tuple(reads), stores=tuple(written), keeps_sums=keeps)
    declared = [f"const {read.buffer.c_type} *{read.buffer.name}" for read in reads]
    declared += [f"{store.buffer.c_type} *{store.buffer.name}" for store in written]
    declared += ["int keeps"] if keeps else []
    calls = {}
    for use in uses:
        own = {store.key: place(store.buffer) for store in use.stores}
        passed = [*(place(read.buffer) for read in use.reads), *(own.get(key, "0") for key in stores)]
        passed += [str(int(use.keeps_sums))] if keeps else []
        calls[use.number] = f"kan_layer{first.number}({', '.join(['state', *passed])});"
    text = render_layer(one, lambda buffer: buffer.name, declared)
    return Calls(replace(text, products=len(uses) * text.products), calls)


def _are_one(a: Contract, b: Contract) -> bool:
    """Whether two steps are uses of one layer: the same numbers, whatever they read and write."""
    return (
        (a.layer, a.window, a.bits, len(a.reads), len(a.scale_groups))
        == (b.layer, b.window, b.bits, len(b.reads), len(b.scale_groups))
        and all(_read_alike(*reads) for reads in zip(a.reads, b.reads, strict=True))
        and all(map(_are_equal, (a.weight, a.bias, a.border), (b.weight, b.bias, b.border)))
        and all(
            one.segments == other.segments
            and _are_equal(one.scale, other.scale)
            and _are_equal(one.factor, other.factor)
            for one, other in zip(a.scale_groups, b.scale_groups, strict=True)
        )
    )


def _read_alike(a: Read, b: Read) -> bool:
    forms = (a.n_in, a.buffer.wide) == (b.n_in, b.buffer.wide)
    return forms and _are_equal(a.table, b.table) and _are_equal(a.first_row, b.first_row)


def _are_equal(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
