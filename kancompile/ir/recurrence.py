"""A layer of an LSTM, a GRU or a plain recurrent network over all steps, as one operator with the meaning that ONNX gives it.

``torch.export`` writes such a layer as a call for every step. As one operator it keeps one copy of its weights, its length may
be dynamic, and a target that has the operator needs one node. It is computed in float, by PyTorch's own kernel.

Shapes: ``t`` steps, ``b`` batch, ``d`` directions (1 or 2), ``n`` inputs, ``h`` outputs, ``g`` gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
"""Kinds of layers, as PyTorch calls them, with PyTorch's number of each of ONNX's gates: ``iofc``, ``zrh`` and one alone."""

_SCHEMA = "(Tensor x, Tensor weight, Tensor recurrent, Tensor? bias, Tensor[] states) -> Tensor[]"


def onnx_gates(weight: Tensor, kind: str) -> Tensor:
    """Bring ``[g h, ...]`` from PyTorch's order of gates into ONNX's."""
    parts = weight.chunk(len(GATES[kind]))
    return torch.cat([parts[number] for number in GATES[kind]])


def _run(
    kind: str, x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, states: Sequence[Tensor]
) -> list[Tensor]:
    """Run a layer over a sequence, the second direction from its end.

    Args:
        kind: one of :data:`GATES`, the name of the operator.
        x: ``[t, b, n]``.
        weight, recurrent: of the inputs ``[d, g h, n]`` and of the state before ``[d, g h, h]``, gates in ONNX's order.
        bias: ``[d, 2 g h]``, that of the inputs first.
        states: first state ``[d, b, h]``, for an LSTM its cell as well; none for zeros.

    Returns:
        all states ``[t, d, b, h]``, and the last of each direction ``[d, b, h]``, for an LSTM its cell as well.
    """
    return [part.clone() for part in _computed(kind, x, weight, recurrent, bias, states)]  # they may share storage


def _shapes(
    kind: str, x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, states: Sequence[Tensor]
) -> list[Tensor]:
    (t, b, _), (d, _, h) = x.shape, recurrent.shape
    last = [x.new_empty((d, b, h)) for _ in range(2 if kind == "lstm" else 1)]
    return [x.new_empty((t, d, b, h)), *last]


def _computed(
    kind: str, x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, states: Sequence[Tensor]
) -> list[Tensor]:
    (d, _, h), b = recurrent.shape, x.shape[1]
    states = list(states) or [x.new_zeros((d, b, h)) for _ in range(2 if kind == "lstm" else 1)]
    parameters = []
    for direction in range(d):
        own = [weight[direction], recurrent[direction]]
        own += [] if bias is None else list(bias[direction].chunk(2))
        parameters += [_pytorch_gates(part, kind) for part in own]
    function: Any = getattr(torch, kind)
    state = states if kind == "lstm" else states[0]
    y, *last = function(x, state, parameters, bias is not None, 1, 0.0, False, d == 2, False)
    return [y.unflatten(-1, (d, h)).transpose(1, 2), *last]


def _pytorch_gates(weight: Tensor, kind: str) -> Tensor:
    order = GATES[kind]
    parts = weight.chunk(len(order))
    return torch.cat([parts[order.index(number)] for number in range(len(order))])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, recurrent, bias, states = inputs
    ctx.save_for_backward(x, weight, recurrent, bias, *states)


def _gradients(kind: str, ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x, weight, recurrent, bias, *states = given = ctx.saved_tensors
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    with torch.enable_grad():
        outputs = _computed(kind, x, weight, recurrent, bias, states)
    # sensitivities take derivatives of these
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=torch.is_grad_enabled()))
    each = [next(found) if tensor is not None and tensor.requires_grad else None for tensor in given]
    return (*each[:4], each[4:])


def _registered(kind: str) -> Any:
    operator = torch.library.custom_op(f"kancompile::{kind}", partial(_run, kind), mutates_args=(), schema=_SCHEMA)
    operator.register_fake(partial(_shapes, kind))
    operator.register_autograd(partial(_gradients, kind), setup_context=_keep)
    return getattr(torch.ops.kancompile, kind).default


RECURRENCES = {kind: _registered(kind) for kind in GATES}
"""The operators, by kind."""
