"""Where rows along dynamic dimensions end: behind what adds them up, picks or moves them, or computes with their number.

With dynamic dimensions beside the batch a row is a token or a pixel (``batch_layout``), and a layer is read off with one of them.
What mixes rows is therefore no part of a layer, and its result is followed anew. Convolutions are, over whole images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from kancompile.frontend.flow.batch_layout import NotLowerableError, layout_of
from kancompile.frontend.flow.verdicts import Track, operator_name

_OF_CONVOLUTIONS = frozenset({"constant_pad_nd", "im2col", "convolution"})
"""Know what they move."""
_SUMS = frozenset({"add", "sub", "rsub"})


def leaves_rows(
    node: fx.Node,
    ids: Tensor,
    tracks: Mapping[fx.Node, Track],
    of_anchor: Tensor,
    batch: sympy.Symbol,
    sized: set[fx.Node],
) -> bool:
    """Whether a node picks or moves rows, such as the last step of a sequence, or computes with their number.

    Args:
        node: it follows one anchor.
        ids: what its elements follow.
        tracks: of what it reads.
        of_anchor: ids of the anchor.
        batch: symbol of the batch size.
        sized: constants that depend on sizes.
    """
    if operator_name(node) in _OF_CONVOLUTIONS:
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        values = [source.meta["val"] for source in node.all_input_nodes if source in sized]
        if any(isinstance(value, torch.SymInt | torch.SymFloat) or value.dim() == 0 for value in values):
            return True
    if has_other_rows(node, tracks):
        return True
    source, track = next(iter(tracks.items()))
    try:
        before, behind = (
            _are_in_rows(*end, track.anchor, of_anchor, batch) for end in ((source, track.ids), (node, ids))
        )
    except NotLowerableError:
        return False
    return before and not behind


def mixes_rows(node: fx.Node, sources: Iterable[fx.Node], contraction: bool) -> bool:
    """Whether a sum goes along a dynamic dimension, or a join does that is no sum."""
    name = operator_name(node)
    if name in _OF_CONVOLUTIONS or (name in _SUMS and not contraction):
        return False
    if name == "cumsum":
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
        assert isinstance(dim, int)
        return not isinstance(node.meta["val"].shape[dim], int)
    return has_other_rows(node, sources)


def has_other_rows(node: fx.Node, sources: Iterable[fx.Node]) -> bool:
    """Whether a node has more or fewer rows than what it reads: its sizes are no multiple of the same number at all sizes."""
    own = _counts(node)
    return any(own[0] * other[1] != own[1] * other[0] for other in map(_counts, sources))


def _counts(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """Give the product of a tensor's symbolic sizes at two choices of all symbols; one size may be written in several ways."""
    size = sympy.prod([size.node.expr for size in node.meta["val"].shape if not isinstance(size, int)])
    first, second = (
        {s: sympy.prime(start + sum(map(ord, str(s)))) for s in size.free_symbols} for start in (100, 1000)
    )
    return size.subs(first), size.subs(second)


def _are_in_rows(node: fx.Node, ids: Tensor, anchor: fx.Node, of_anchor: Tensor, batch: sympy.Symbol) -> bool:
    """Whether all elements of a row follow that row of the anchor.

    Raises:
        NotLowerableError: it is not known what rows are.
    """
    before, behind = (layout_of(end, batch) for end in (anchor, node))
    numbers = before.to_samples(of_anchor).flatten(1)
    row = torch.empty(numbers.numel(), dtype=torch.int64)
    row[numbers.flatten()] = torch.arange(len(numbers)).repeat_interleave(numbers.shape[1])
    own = behind.to_samples(ids).flatten(1)
    if len(own) != len(numbers):  # a dimension of channels within one of rows, as between the two halves of torch.stack
        raise NotLowerableError(f"{node.name} has other rows than {anchor.name}")
    return bool(((own < 0) | (row[own.clamp(min=0)] == torch.arange(len(own))[:, None])).all())
