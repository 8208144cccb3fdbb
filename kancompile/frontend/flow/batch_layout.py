"""Where the batch stands in a tensor of the exported graph, and how to bring it to the front.

KAN modules read and write ``[b, *shape]``. A traced tensor may hold the batch elsewhere (``[n, b]``) or merged with tokens
(``[b * tokens, n]``, after a reshape). The symbolic shapes of the trace say which.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv, Mod

_ATEN = torch.ops.aten


class NotLowerableError(Exception):
    """A part of the graph cannot take the canonical form; the text is the reason that reports show."""


@dataclass(frozen=True)
class BatchLayout:
    """The batch of a tensor: dimension ``dim`` has ``factor * b`` elements, samples outermost.

    Attributes:
        dim: dimension that holds the batch.
        factor: elements of that dimension for one sample.
        shape: shape of one sample, a ``factor`` above 1 first.
    """

    dim: int
    factor: int
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the tensor already is ``[b, *shape]``."""
        return self.dim == 0 and self.factor == 1

    def to_samples(self, value: Tensor) -> Tensor:
        """Regroup a tensor of this layout to ``[b, *shape]``."""
        return value if self.is_plain else value.movedim(self.dim, 0).reshape(-1, *self.shape)

    def emit_to_samples(self, graph: fx.Graph, node: fx.Node, batch: fx.Node) -> fx.Node:
        """Append nodes that regroup ``node`` to ``[b, *shape]``."""
        if self.is_plain:
            return node
        if self.dim:
            order = [self.dim, *(d for d in range(self._rank) if d != self.dim)]
            node = graph.call_function(_ATEN.permute.default, (node, order))
        return graph.call_function(_ATEN.reshape.default, (node, [batch, *self.shape]))

    def emit_from_samples(self, graph: fx.Graph, node: fx.Node, batch: fx.Node) -> fx.Node:
        """Append nodes that regroup ``[b, *shape]`` to this layout."""
        if self.is_plain:
            return node
        rest = self.shape[1:] if self.factor > 1 else self.shape
        rows: Any = batch if self.factor == 1 else graph.call_function(operator.mul, (batch, self.factor))
        node = graph.call_function(_ATEN.reshape.default, (node, [rows, *rest]))
        if self.dim:
            order = [*range(1, self.dim + 1), 0, *range(self.dim + 1, self._rank)]
            node = graph.call_function(_ATEN.permute.default, (node, order))
        return node

    @property
    def _rank(self) -> int:
        return len(self.shape) + (0 if self.factor > 1 else 1)


def layout_of(node: fx.Node, batch: sympy.Expr) -> BatchLayout:
    """Read the layout of a node from its symbolic shape.

    Raises:
        NotLowerableError: not exactly one dimension is a multiple of the batch size.
    """
    sizes = node.meta["val"].shape
    symbolic = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) != 1:
        raise NotLowerableError(f"{node.name} has {len(symbolic)} dimensions that depend on the batch size, not one")
    dim = symbolic[0]
    factor = sizes[dim].node.expr / batch
    if not factor.is_Integer:
        raise NotLowerableError(f"dimension {dim} of {node.name} is not a multiple of the batch size")
    rest = tuple(int(size) for d, size in enumerate(sizes) if d != dim)
    return BatchLayout(dim, int(factor), rest if factor == 1 else (int(factor), *rest))


def emit_size(graph: fx.Graph, expression: sympy.Expr, symbol: sympy.Expr, batch: fx.Node) -> Any:
    """Append nodes that compute a size from the batch size.

    Raises:
        NotLowerableError: the size is no sum, product, quotient or remainder of the batch size and numbers.
    """

    def emit(term: sympy.Expr) -> Any:
        if term == symbol:
            return batch
        if term.is_Integer:
            return int(term)
        binary = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv, Mod: operator.mod}
        function = binary.get(type(term))
        if function is None:
            raise NotLowerableError(f"the size {expression} is not arithmetic of the batch size")
        first, *others = (emit(argument) for argument in term.args)
        for other in others:
            first = graph.call_function(function, (first, other))
        return first

    return emit(sympy.expand(expression))
