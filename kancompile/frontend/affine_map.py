"""The exact matrix of an affine part of the graph.

The part is run with all inputs at zero, one copy of the sample for each output, and differentiated once: row ``o`` of the
batch gives the gradient of output ``o``, so one backward pass yields as many matrix rows as the batch has samples.
Differentiating an affine function multiplies and adds its constants only, so a plain product comes out without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kancompile.frontend.batch_layout import NotLowerableError

_CHUNK_ELEMENTS = 1 << 23
"""Elements of the largest intermediate tensor of one chunk (32 MiB in float32)."""


def affine_map(
    module: fx.GraphModule,
    shapes: Sequence[Sequence[int]],
    columns: Sequence[Tensor],
    n_out: int,
    row_elements: int,
) -> tuple[list[Tensor], Tensor]:
    """Compute ``y = sum of matrix_j @ x_j + bias`` of a module that is affine in its inputs.

    Args:
        module: maps tensors ``[b, *shapes[j]]`` to one tensor, samples independent of each other.
        shapes: input shapes without the batch.
        columns: int64, for each input the flattened elements whose columns are wanted.
        n_out: how many of the flattened outputs are wanted, from the first on.
        row_elements: elements for one sample of its largest intermediate tensor, which sets the chunk size.

    Returns:
        float32 matrices ``[n_out, len(columns[j])]`` and the bias ``[n_out]``.

    Raises:
        NotLowerableError: an operator has no derivative.
    """
    chunk = max(1, min(n_out, _CHUNK_ELEMENTS // row_elements))
    parts: list[list[Tensor]] = [[] for _ in shapes]
    bias = torch.empty(0)
    with torch.enable_grad():
        for start in range(0, n_out, chunk):
            rows = min(chunk, n_out - start)
            inputs = [torch.zeros(rows, *shape, requires_grad=True) for shape in shapes]
            outputs = module(*inputs).flatten(1)
            if start == 0:
                bias = outputs[0, :n_out].detach().float()
            diagonal = outputs[torch.arange(rows), start + torch.arange(rows)].sum()
            try:
                gradients = torch.autograd.grad(diagonal, inputs, allow_unused=True)
            except RuntimeError as error:
                raise NotLowerableError(f"its affine part has no derivative ({str(error).splitlines()[0]})") from error
            for part, source, gradient, wanted in zip(parts, inputs, gradients, columns, strict=True):
                row = (torch.zeros_like(source) if gradient is None else gradient).detach().flatten(1)
                part.append(row[:, wanted])
    return [torch.cat(part).float() for part in parts], bias
