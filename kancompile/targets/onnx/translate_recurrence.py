"""How recurrent layers are written: one LSTM, GRU or RNN for all steps and both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from onnxscript import opset21 as op

from kancompile.ir import RECURRENCES
from kancompile.targets.onnx.translation import Value


def recurrence(
    kind: str, x: Value, weight: Value, recurrent: Value, bias: Value | None, states: Sequence[Value]
) -> tuple[Value, ...]:
    """Write one layer; ONNX's operators have the shapes and the order of gates of ``kancompile.ir.recurrence``."""
    d, _, h = (int(size) for size in recurrent.shape)
    given = (x, weight, recurrent, bias, None, *states)
    options: dict[str, Any] = {"hidden_size": h, "direction": "bidirectional" if d == 2 else "forward"}
    if kind == "lstm":
        return tuple(op.LSTM(*given, **options))
    if kind == "gru":  # PyTorch resets what the product of the state gave
        return tuple(op.GRU(*given, **options, linear_before_reset=1))
    return tuple(op.RNN(*given, **options, activations=[kind.removeprefix("rnn_").capitalize()] * d))


RECURRENCE_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator: partial(recurrence, kind) for kind, operator in RECURRENCES.items()
}
