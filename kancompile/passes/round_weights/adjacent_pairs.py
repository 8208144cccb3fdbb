"""Pairs of neighboring columns whose products are added in a saturating int16: which overflow, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

INT8_MAX, INT16_MAX = (1 << 7) - 1, (1 << 15) - 1
LARGEST_CONSTANT = 64
_ALWAYS_FITS = 64
ELEMENTS = 1 << 24
"""Of temporary tensors, at most."""


@dataclass(frozen=True)
class AdjacentPairs:
    """The pairs of columns of one integer product, and the codes that can meet in them.

    Attributes:
        columns: int64 ``[p, 2]``: the two columns of every pair, by their place in the weight ``[n_out, c]``; the second is -1
            for a constant column, which counts as one of weight 64 and code 255. A column may stand in several pairs.
        largest: int64 ``[p, 2]``: the largest code of each.
        start: int64 ``[p]``: first row of the table in which both columns are looked up, -1 where they belong to
            different inputs.
        code_columns: int64 ``[p, 2]``: their columns in ``codes``; only read where ``start`` is not -1.
        codes: int32 ``[rows, k]``, all tables of the layer one below the other, filled up with 0 to the widest.
        levels: int64 ``[p]``: rows of that table.
        outside: the code of both columns outside of an image, or ``None`` where nothing is padded.
    """

    columns: Tensor
    largest: Tensor
    start: Tensor
    code_columns: Tensor
    codes: Tensor
    levels: Tensor
    outside: int | None = None

    def overflows(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the pairs that a weight makes overflow.

        Args:
            weight: int8 codes ``[n_out, c]``.

        Returns:
            output and pair of each, int64 ``[e]``, and the largest sum, int64 ``[e]``.
        """
        outputs, pairs, sums = [], [], []
        step = max(1, ELEMENTS // max(1, weight.shape[0]))
        for first in range(0, max(1, len(self.columns)), step):  # a layer of one column has no pairs
            part = slice(first, first + step)
            w = self.columns_of(weight, part)
            bound = (w.abs() * self.largest[part]).sum(2)
            output, pair = ((w.prod(2) > 0) & (bound > INT16_MAX)).nonzero(as_tuple=True)
            pair = pair + first
            reach = self.reach(pair, self.weights(weight, output, pair).abs())
            found = reach > INT16_MAX
            outputs.append(output[found])
            pairs.append(pair[found])
            sums.append(reach[found])
        return torch.cat(outputs), torch.cat(pairs), torch.cat(sums)

    def weights(self, weight: Tensor, output: Tensor, pair: Tensor) -> Tensor:
        """Return the two weights of some pairs, int64 ``[e, 2]``."""
        columns = self.columns[pair]
        found = weight[output[:, None], columns.clamp(min=0)].to(torch.int64)
        return torch.where(columns < 0, found[:, :1].sign() * LARGEST_CONSTANT, found)

    def limits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Give bounds within which the codes of a weight can move while all pairs go on to fit, as they do now.

        Two sizes of at most 64 fit beside each other whatever the table (``2 * 255 * 64 = 32640``). In another pair the
        larger weight neither grows nor changes its sign; the smaller one may have any size against that sign, and with it
        what it has now or what the largest codes leave room for.

        Args:
            weight: int8 codes ``[n_out, c]``.

        Returns:
            smallest and largest code of every weight, int64 ``[n_out, c]``.
        """
        low, high = torch.full(weight.shape, -INT8_MAX), torch.full(weight.shape, INT8_MAX)
        step = max(1, ELEMENTS // max(1, len(weight)))
        for first in range(0, len(self.columns), step):
            part = slice(first, first + step)
            w, columns, largest = self.columns_of(weight, part), self.columns[part], self.largest[part]
            size = w.abs()
            small = (size <= _ALWAYS_FITS).all(2)
            for which in (0, 1):
                other = 1 - which
                own, partner = w[..., which], w[..., other]
                leads = size[..., which] > size[..., other] if which else size[..., which] >= size[..., other]
                sign = partner.sign()
                room = (INT16_MAX - largest[:, other] * size[..., other]) // largest[:, which].clamp(min=1)
                most = torch.maximum(own * sign, room).clamp(max=INT8_MAX)  # in the direction of the partner
                least = torch.where(sign > 0, -INT8_MAX, -most)
                most = torch.where(sign > 0, most, INT8_MAX)
                least = torch.where(leads, own.clamp(max=0), least)
                most = torch.where(leads, own.clamp(min=0), most)
                known = columns[:, which] >= 0
                place = columns[known, which].expand(len(weight), -1)
                low.scatter_reduce_(1, place, torch.where(small, -_ALWAYS_FITS, least)[:, known], "amax")
                high.scatter_reduce_(1, place, torch.where(small, _ALWAYS_FITS, most)[:, known], "amin")
        return low, high

    def columns_of(self, weight: Tensor, part: slice) -> Tensor:
        """Return the weights of a range of pairs, int64 ``[n_out, p, 2]``."""
        columns = self.columns[part]
        found = weight[:, columns.clamp(min=0)].to(torch.int64)
        return torch.where(columns < 0, found[..., :1].sign() * LARGEST_CONSTANT, found)

    def reach(self, pair: Tensor, size: Tensor) -> Tensor:
        """Return the largest ``q0 * size0 + q1 * size1`` of some pairs, int64 ``[e]``, for sizes ``[e, 2]``."""
        sums = (self.largest[pair] * size).sum(1)
        for part, codes in self._joint(pair):
            sums[part] = (codes * size[part, None]).sum(2).amax(1)
        return sums

    def room(self, pair: Tensor, size: Tensor, which: int) -> Tensor:
        """Return the largest size that one of the weights may have beside the other as it is, int64 ``[e]``.

        Args:
            pair: some pairs.
            size: of their weights, ``[e, 2]``, each at most 127.
            which: 0 or 1.
        """
        other = 1 - which
        largest = self.largest[pair]
        free = INT16_MAX - largest[:, other] * size[:, other]
        result = free // largest[:, which].clamp(min=1)
        for part, codes in self._joint(pair):
            left = INT16_MAX - codes[:, :, other] * size[part, other, None]
            result[part] = torch.where(codes[:, :, which] > 0, left // codes[:, :, which].clamp(min=1), 127).amin(1)
        return result.clamp(max=127)

    def _joint(self, pair: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for pairs within one table, places in ``pair`` and codes that decide, ``[e', points, 2]``, in chunks."""
        number, points = self._fronts
        joint = (number[pair] >= 0).nonzero().flatten()
        for part in joint.split(max(1, ELEMENTS // (2 * points.shape[1]))):
            yield part, points[number[pair[part]]]

    @cached_property
    def _fronts(self) -> tuple[Tensor, Tensor]:
        """Codes of two columns of a table that none of its other rows exceeds in both, which alone decide what fits.

        Returns:
            int64 ``[p]``, number of each pair's front, -1 where a pair has none; int64 ``[fronts, points, 2]``, filled up with 0.
        """
        number = torch.full((len(self.columns),), -1)
        joint = (self.start >= 0).nonzero().flatten()
        keys = torch.cat([self.levels[joint, None], self.start[joint, None], self.code_columns[joint]], dim=1)
        keys, number[joint] = keys.unique(dim=0, return_inverse=True)
        fronts = [
            self._front(part)
            for alike in _runs(keys)
            for part in alike.split(max(1, ELEMENTS // (2 * int(alike[0, 0]))))
        ]
        most = max((front.shape[1] for front in fronts), default=1)
        padded = [torch.nn.functional.pad(front, (0, 0, 0, most - front.shape[1])) for front in fronts]
        return number, torch.cat(padded) if padded else torch.zeros(0, 1, 2, dtype=torch.int64)

    def _front(self, keys: Tensor) -> Tensor:
        rows = keys[:, 1:2] + torch.arange(int(keys[0, 0]))
        codes = self.codes[rows[:, :, None], keys[:, None, 2:]].to(torch.int64)  # [n, rows, 2]
        if self.outside is not None:
            codes = torch.cat([codes, torch.full_like(codes[:, :1], self.outside)], dim=1)
        order = (codes[..., 0] * 256 + codes[..., 1]).sort(dim=1, descending=True).values
        second = order % 256
        before = torch.nn.functional.pad(second.cummax(1).values[:, :-1], (1, 0), value=-1)
        decides = second > before
        order = torch.where(decides, order, 0).sort(dim=1, descending=True).values[:, : int(decides.sum(1).max())]
        return torch.stack([order // 256, order % 256], dim=2)


def _runs(keys: Tensor) -> list[Tensor]:
    """Divide sorted rows where their first number changes."""
    return list(keys.split(keys[:, 0].unique_consecutive(return_counts=True)[1].tolist())) if len(keys) else []
