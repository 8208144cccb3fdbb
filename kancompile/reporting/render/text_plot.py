"""Draw an edge function with characters, for terminals."""

from __future__ import annotations

from torch import Tensor

from kancompile.validation import Edge

_FLOAT, _COMPILED = "·", "#"


def text_plot(edge: Edge, width: int = 64, height: int = 12) -> str:
    """Draw the float function as dots and the compiled one as ``#``, which stands where both are.

    Args:
        edge: its curves.
        width, height: columns and rows of the plot.
    """
    places = [round(column * (len(edge.x) - 1) / (width - 1)) for column in range(width)]
    low = float(min(edge.exact.min(), edge.compiled.min()))
    high = float(max(edge.exact.max(), edge.compiled.max()))
    rows = [[" "] * width for _ in range(height)]

    def put(curve: Tensor, sign: str) -> None:
        for column, place in enumerate(places):
            share = (float(curve[place]) - low) / max(high - low, 1e-30)
            rows[height - 1 - round(share * (height - 1))][column] = sign

    put(edge.exact, _FLOAT)
    put(edge.compiled, _COMPILED)
    labels = [f"{high:8.2f} ", *[" " * 9] * (height - 2), f"{low:8.2f} "]
    lines = [f"{label}|{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    ends = f"{float(edge.x[0]):.2f}", f"{float(edge.x[-1]):.2f}"
    axis = " " * 10 + ends[0] + ends[1].rjust(width - len(ends[0]))
    head = (
        f"{edge.name.layer}, input {edge.name.input} -> output {edge.name.output}: {_FLOAT} float, {_COMPILED} compiled"
    )
    return "\n".join([f"{head}, {edge.sqnr_db:.1f} dB", *lines, axis])
