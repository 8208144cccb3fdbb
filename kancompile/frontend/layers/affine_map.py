"""The exact matrix of an affine part of the graph.

The part is run on copies of one sample and differentiated once: row ``r`` of the batch gives the gradient of output ``r``,
so one backward pass yields as many matrix rows as the batch has samples, times the tokens where all tokens have the same
map. Differentiating an affine function only multiplies and adds its constants, so a plain product comes out unrounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kancompile.errors import reason
from kancompile.frontend.flow import Axes, NotLowerableError

_CHUNK_ELEMENTS = 1 << 23
"""Elements of the largest intermediate tensor of one chunk (32 MiB in float32)."""


def affine_map(
    module: fx.GraphModule,
    base: Sequence[Tensor],
    columns: Sequence[Tensor],
    n_out: int,
    row_elements: int,
    order: Axes,
) -> tuple[list[Tensor], Tensor]:
    """Compute ``y = sum of matrix_j @ x_j + bias`` of a module that is affine in its inputs.

    Args:
        module: maps tensors ``[b, *shape_j]`` to ``[b, *]`` of ``tokens * n_out`` elements, samples independent of each other.
        base: float32 ``[*shape_j]``, where the bias is taken: 0, or the value of an element that is constant.
        columns: int64 ``[tokens, c_j]``, for each token the flattened elements of input ``j`` that it is made of. With
            several tokens, their maps are taken to be the same and separate; the caller has to confirm it.
        n_out: outputs of one token.
        row_elements: elements for one sample of the largest intermediate tensor, which sets the chunk size.
        order: brings what the module yields to ``[b, tokens, n_out]``.

    Returns:
        float32 matrices ``[n_out, c_j]`` and the bias ``[n_out]``.

    Raises:
        NotLowerableError: an operator has no derivative.
    """
    tokens = len(columns[0])
    chunk = max(1, min(-(-n_out // tokens), _CHUNK_ELEMENTS // row_elements))
    parts: list[list[Tensor]] = [[] for _ in base]
    bias = torch.empty(0)
    with torch.enable_grad():
        for start in range(0, n_out, chunk * tokens):
            wanted = torch.arange(start, min(start + chunk * tokens, n_out))
            places = torch.arange(len(wanted))
            rows = -(-len(wanted) // tokens)
            inputs = [value.expand(rows, *value.shape).clone().requires_grad_() for value in base]
            outputs = order(module(*inputs), (tokens, n_out))
            bias = outputs[0, 0].detach()
            try:
                gradients = torch.autograd.grad(
                    outputs[places // tokens, places % tokens, wanted].sum(), inputs, allow_unused=True
                )
            except RuntimeError as error:
                raise NotLowerableError(f"its affine part has no derivative ({reason(error)})") from error
            for part, source, gradient, places_of in zip(parts, inputs, gradients, columns, strict=True):
                row = (torch.zeros_like(source) if gradient is None else gradient).detach().flatten(1)
                part.append(row[:, places_of].flatten(0, 1)[: len(wanted)])
    return [torch.cat(part) for part in parts], bias
