"""Keep recurrent layers whole, for which ``torch.export`` would write every step.

    lstm(x, (h, c), parameters of two layers)    ->    y = lstm(x, layer 0, h[0], c[0]),  lstm(y, layer 1, h[1], c[1])

Two roads lead there. A module is traced with :class:`WholeRecurrences`, so that its length stays dynamic; programs that were
exported elsewhere hold PyTorch's operators, which are decomposed by the same formula. LSTMs with projections, for which ONNX has
no operator, packed sequences and dropout in training stay with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from kancompile.ir import GATES, RECURRENCES, onnx_gates

_KINDS: dict[Any, str] = {getattr(torch, kind): kind for kind in GATES}
_SELECTIONS = ("aten.slice.Tensor", "aten.select.int", "aten.alias.default", "aten.clone.default")


class WholeRecurrences(TorchFunctionMode):
    """While it is entered, PyTorch's recurrent layers are calls of our operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Exchange one call."""
        kind = _KINDS.get(func)
        if kind is not None and not kwargs and _is_plain(kind, *args):
            return whole(kind, *args)
        return func(*args, **(kwargs or {}))


def whole(
    kind: str,
    x: Tensor,
    states: Any,
    parameters: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Write a stack of recurrent layers, called as PyTorch's operators are.

    Args:
        kind: one of :data:`~kancompile.ir.GATES`.
        x: ``[t, b, n]``, or ``[b, t, n]`` with ``batch_first``.
        states: first state ``[layers d, b, h]``; for an LSTM a pair.
        parameters: two or, with biases, four tensors for every direction of every layer.
        has_biases, layers, dropout, train, bidirectional, batch_first: as of ``torch.lstm``.

    Returns:
        the sequence, and the last states.
    """
    d, count = 1 + bidirectional, 4 if has_biases else 2
    given = list(states) if kind == "lstm" else [states]
    last: list[list[Tensor]] = [[] for _ in given]
    y = x.transpose(0, 1) if batch_first else x
    for layer in range(layers):
        rows = range(layer * d * count, (layer + 1) * d * count, count)
        weight, recurrent, *biases = (
            torch.stack([onnx_gates(parameters[row + part], kind) for row in rows]) for part in range(count)
        )
        own = given if layers == 1 else [state[layer * d : (layer + 1) * d] for state in given]
        bias = torch.cat(biases, 1) if biases else None
        y, *found = RECURRENCES[kind](y, weight, recurrent, bias, own)
        y = y.transpose(1, 2).flatten(2) if bidirectional else y.squeeze(1)
        for parts, part in zip(last, found, strict=True):
            parts.append(part)
    return (y.transpose(0, 1) if batch_first else y, *(torch.cat(parts) if layers > 1 else parts[0] for parts in last))


def _decomposition(kind: str) -> tuple[Any, Callable[..., Any]]:
    operator = getattr(torch.ops.aten, kind).input
    by_step = torch._decomp.decomposition_table[operator]

    def decomposed(*args: Any) -> Any:
        return whole(kind, *args) if _is_plain(kind, *args) else by_step(*args)

    return operator, decomposed


WHOLE_RECURRENCES: dict[Any, Callable[..., Any]] = dict(map(_decomposition, GATES))
"""Decompositions of PyTorch's operators."""


def _is_plain(kind: str, x: Any, states: Any, parameters: Any, *options: Any) -> bool:
    """Whether ONNX has an operator for a call: no packed sequence, no projections, no dropout."""
    if isinstance(states, Tensor) == (kind == "lstm") or isinstance(parameters, Tensor):
        return False
    _, _, dropout, train, *_ = options
    has_projections = kind == "lstm" and bool(states[0].shape[-1] != states[1].shape[-1])
    return not has_projections and not (train and dropout)


def drop_zero_states(graph: fx.Graph) -> None:
    """Leave first states out that are zeros, as ``nn.LSTM`` makes them: to write and to slice them takes nodes."""
    for node in graph.nodes:
        if node.target in RECURRENCES.values() and node.args[4] and all(map(_is_zero, node.args[4])):
            node.update_arg(4, [])


def _is_zero(node: fx.Node) -> bool:
    while str(node.target) in _SELECTIONS:
        node = node.args[0]  # type: ignore[assignment]
    return node.target is torch.ops.aten.full.default and bool(node.args[1] == 0)
