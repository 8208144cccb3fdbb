"""Where the batch stands in a tensor of the exported graph, and how to bring it to the front.

KAN modules read and write ``[rows, *shape]``. A traced tensor may hold the batch elsewhere (``[n, b]``), merged with tokens
(``[b * tokens, n]``, after a reshape), or beside other dynamic dimensions (``[b, tokens, n]``), along which a layer is the same
everywhere: rows are then tokens. The symbolic shapes of the trace say which.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch.utils._sympy.functions import FloorDiv, Mod

_ATEN = torch.ops.aten


class NotLowerableError(Exception):
    """A part of the graph cannot take the canonical form; the text is the reason that reports show."""


Sizes = Mapping[sympy.Symbol, Any]
"""What stands for the symbols of sizes in a graph: nodes that hold them, or numbers."""


@dataclass(frozen=True)
class BatchLayout:
    """The rows of a tensor: elements that differ in nothing but where they stand, such as samples, or all tokens of all samples.

    Without dynamic dimensions beside the batch, rows are samples: dimension ``dims[0]`` has ``factor * b`` elements, samples
    outermost. With one, ``[b, s, n]`` has ``b s`` rows of shape ``[n]``, sample by sample.

    Attributes:
        dims: dimensions that rows are counted along, the batch first.
        sizes: of those dimensions.
        factor: elements of the batch's dimension for one row.
        shape: shape of one row, a ``factor`` above 1 first.
    """

    dims: tuple[int, ...]
    sizes: tuple[sympy.Expr, ...]
    factor: int
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the tensor already is ``[rows, *shape]``."""
        return self.dims == (0,) and self.factor == 1

    def to_samples(self, value: Tensor) -> Tensor:
        """Regroup a tensor of this layout to ``[rows, *shape]``."""
        return value if self.is_plain else value.permute(self._order).reshape(-1, *self.shape)

    def emit_to_samples(self, graph: fx.Graph, node: fx.Node, sizes: Sizes) -> fx.Node:
        """Append nodes that regroup ``node`` to ``[rows, *shape]``."""
        if self.is_plain:
            return node
        if self._order != sorted(self._order):
            node = graph.call_function(_ATEN.permute.default, (node, self._order))
        return graph.call_function(_ATEN.reshape.default, (node, [self._emit_rows(graph, sizes), *self.shape]))

    def emit_from_samples(self, graph: fx.Graph, node: fx.Node, sizes: Sizes) -> fx.Node:
        """Append nodes that regroup ``[rows, *shape]`` to this layout."""
        if self.is_plain:
            return node
        rest = self.shape[1:] if self.factor > 1 else self.shape
        ends = [emit_size(graph, size, sizes) for size in self.sizes]
        node = graph.call_function(_ATEN.reshape.default, (node, [*ends, *rest]))
        if self._order != sorted(self._order):
            back = [self._order.index(dim) for dim in range(len(self._order))]
            node = graph.call_function(_ATEN.permute.default, (node, back))
        return node

    def _emit_rows(self, graph: fx.Graph, sizes: Sizes) -> Any:
        return emit_size(graph, math.prod(self.sizes) / self.factor, sizes)

    @property
    def _order(self) -> list[int]:
        rank = len(self.shape) + len(self.dims) - (1 if self.factor > 1 else 0)
        return [*self.dims, *(dim for dim in range(rank) if dim not in self.dims)]


def layout_of(node: fx.Node, batch: sympy.Symbol) -> BatchLayout:
    """Read the layout of a node from its symbolic shape.

    Raises:
        NotLowerableError: not exactly one dimension is a multiple of the batch size, or several such dimensions are more than
            the batch and dynamic sizes.
    """
    shape = [_known(size) for size in node.meta["val"].shape]
    symbolic = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
    with_batch = [dim for dim in symbolic if batch in shape[dim].node.expr.free_symbols]
    if len(with_batch) != 1:
        raise NotLowerableError(f"{node.name} has {len(with_batch)} dimensions that depend on the batch size, not one")
    dims = (with_batch[0], *(dim for dim in symbolic if dim != with_batch[0]))
    expressions = tuple(shape[dim].node.expr for dim in dims)
    factor, rows = expressions[0].as_coeff_Mul()
    is_product = rows.is_Symbol or (rows.is_Mul and all(part.is_Symbol for part in rows.args))
    if not factor.is_Integer or not is_product:
        raise NotLowerableError(f"dimension {dims[0]} of {node.name} is not a multiple of the batch size")
    if len(dims) > 1 and expressions[0] != batch:
        raise NotLowerableError(
            f"{node.name} has {len(dims)} dynamic dimensions that are not the batch and dynamic sizes alone"
        )
    rest = tuple(int(size) for dim, size in enumerate(shape) if dim not in dims)
    return BatchLayout(dims, expressions, int(factor), rest if factor == 1 else (int(factor), *rest))


def _known(size: Any) -> Any:
    """Give the number that a quotient of sizes is, such as ``6 * h * w // (h * w)`` for ``-1`` in a reshape."""
    if isinstance(size, torch.SymInt) and isinstance(size.node.expr, FloorDiv) and size.node.expr.args[1].free_symbols:
        base, divisor = size.node.expr.args
        quotient = sympy.cancel(base / divisor)
        return int(quotient) if quotient.is_Integer else size
    return size


def emit_size(graph: fx.Graph, expression: sympy.Expr, sizes: Sizes) -> Any:
    """Append nodes that compute a size from those of the batch and of dynamic dimensions.

    Raises:
        NotLowerableError: the size is no sum, product, quotient or remainder of them and numbers.
    """
    binary = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv, Mod: operator.mod}

    def emit(term: sympy.Expr) -> Any:
        if term in sizes:
            return sizes[term]
        if term.is_Integer:
            return int(term)
        if isinstance(term, sympy.Pow) and term.exp.is_Integer and term.exp > 0:
            function, parts = operator.mul, [emit(term.base)] * int(term.exp)
        else:
            found = binary.get(type(term))
            if found is None:
                raise NotLowerableError(f"the size {expression} is not arithmetic of the batch size and dynamic sizes")
            function, parts = found, [emit(argument) for argument in term.args]
        first, *others = parts
        for other in others:
            both = isinstance(first, int) and isinstance(other, int)
            first = function(first, other) if both else graph.call_function(function, (first, other))
        return first

    numbers = {symbol: size for symbol, size in sizes.items() if isinstance(size, int | sympy.Rational)}
    return emit(sympy.expand(sympy.sympify(expression).subs(numbers)))
