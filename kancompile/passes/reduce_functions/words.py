"""Find the functions that carry the most of a layer's output, for pairs of inputs that share an index.

A layer is a sum over its inputs of functions with many outputs, ``y = sum_i F_i(x_i)``, ``F_i = W_i phi(x_i)``. With ``C`` the
covariance of the functions of two inputs over calibration data, the singular values of ``[W_a W_b] C^1/2`` say how much of the
output's variance the best common functions carry, and the left singular vectors in which directions of the output (Eckart and
Young, 1936). Each of them is a sum of one function of either input, ``g = u^T F_a(x_a) + u^T F_b(x_b)``, which is known at every
row of the index, and is all that is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PLANES = 3
"""Functions of a word: as many codes as one number holds."""
FLOOR = 0.02
"""Weight of all rows alike in the covariance, so that functions stay right where calibration saw little."""
_NO_VARIANCE = 1e-12
_INPUTS_AT_ONCE = 256  # as much of the weights as is kept in float64


@dataclass(frozen=True)
class Words:
    """Functions of ``m`` inputs, ``PLANES`` to a word, those that carry the most first.

    Attributes:
        members: int64 ``[m, w]``, inputs.
        values: float32 ``[m, PLANES, w, L]``, functions of the members at the rows of the index, their means taken off.
        mix: float32 ``[m, PLANES, w, k]``, of which combination of the functions of a member ``values`` are.
        weight: float32 ``[n_out, PLANES, w]``, in which direction of the output each function goes.
        energy: float64 ``[w]``, of the output's variance that each word carries, descending.
    """

    members: Tensor
    values: Tensor
    mix: Tensor
    weight: Tensor
    energy: Tensor

    def __len__(self) -> int:
        return self.members.shape[1]

    def first(self, count: int) -> Words:
        """Keep the ``count`` words that carry the most."""
        return self._picked(slice(count))

    def in_order(self) -> Words:
        """Sort the words by their inputs, so that neighbors read neighbors."""
        return self._picked(torch.argsort(self.members[0], stable=True))

    def _picked(self, which: slice | Tensor) -> Words:
        return Words(
            self.members[:, which],
            self.values[:, :, which],
            self.mix[:, :, which],
            self.weight[:, :, which],
            self.energy[which],
        )


def find_words(values: Tensor, weight: Tensor, rows: Tensor, most: int, together: int = 2) -> Words:
    """Find words of the most variance.

    Args:
        values: of the functions at the rows, float32 ``[L, n_in, k]``.
        weight: of the layer, ``[n_out, n_in, k]``.
        rows: row numbers of calibration inputs, ``[n, n_in]``.
        most: words to return at most.
        together: inputs of a word.
    """
    levels, n_in, _ = values.shape
    count = torch.stack([(rows == row).sum(0) for row in range(levels)]).double()  # [L, n_in]
    share = ((1 - FLOOR) * count / len(rows) + FLOOR / levels)[..., None]
    centered = values.double() - (share * values.double()).sum(0)
    own = torch.einsum("lik,lij->ikj", share * centered, centered)
    inputs = zip(weight.split(_INPUTS_AT_ONCE, 1), own.split(_INPUTS_AT_ONCE), strict=True)
    variance = torch.cat([(torch.einsum("oik,ikj->oij", w.double(), of) * w).sum((0, 2)) for w, of in inputs])
    kept = torch.nonzero(variance > _NO_VARIANCE * variance.sum())[:, 0]
    is_odd = len(kept) % together > 0
    if is_odd:  # any input makes the last pair whole, as one that says nothing there
        spare = next((i for i in range(n_in) if i not in set(kept.tolist())), int(kept[0]))
        kept = torch.cat([kept, torch.tensor([spare])])
    members = kept.reshape(-1, together).T  # [m, p]
    basis = [centered[:, part].float() for part in members]  # [L, p, k] each
    if is_odd:
        basis[-1][:, -1] = 0.0
    covariance = _covariance(basis, rows, members)
    both = torch.cat([weight[:, part] for part in members], dim=-1).permute(1, 0, 2)  # [p, n_out, m k]
    pairs = zip(both.split(_INPUTS_AT_ONCE), covariance.split(_INPUTS_AT_ONCE), strict=True)
    found = zip(*(_directions(w.double(), of) for w, of in pairs), strict=True)
    energies, directions = (torch.cat(parts) for parts in found)
    del both, covariance
    missing = -energies.shape[1] % PLANES
    energies, directions = (nn.functional.pad(value, (0, missing)) for value in (energies, directions))
    chunks = energies.reshape(len(energies), energies.shape[1] // PLANES, PLANES).sum(-1)
    order = chunks.flatten().argsort(descending=True, stable=True)[:most]
    order = order[chunks.flatten()[order] > 0]
    pair, chunk = order // chunks.shape[1], order % chunks.shape[1]
    place = chunk[:, None] * PLANES + torch.arange(PLANES)
    chosen = torch.gather(directions[pair], 2, place[:, None].expand(-1, directions.shape[1], -1))
    at_rows, mixes = [], []
    for one, part in zip(basis, members, strict=True):
        mixes.append(torch.einsum("wop,owk->pwk", chosen, weight[:, part[pair]]))
        at_rows.append(torch.einsum("lwk,pwk->pwl", one[:, pair], mixes[-1]))
    if is_odd:
        mixes[-1][:, pair == members.shape[1] - 1] = 0.0
    towards = chosen.permute(1, 2, 0).contiguous()
    return Words(members[:, pair], torch.stack(at_rows), torch.stack(mixes), towards, chunks.flatten()[order])


def _covariance(basis: Sequence[Tensor], rows: Tensor, members: Tensor) -> Tensor:
    """Measure the covariance of the functions of every pair, float64 ``[p, m k, m k]``, all rows alike with their floor."""
    pairs, k = basis[0].shape[1:]
    total = torch.zeros(pairs, len(basis) * k, len(basis) * k, dtype=torch.float64)
    place = torch.arange(pairs)
    for part in rows.split(512):
        seen = torch.cat([one[part[:, who], place] for one, who in zip(basis, members, strict=True)], dim=-1)
        total += torch.einsum("npa,npb->pab", seen, seen).double()
    total *= (1 - FLOOR) / len(rows)
    for number, one in enumerate(basis):
        even = one - one.mean(0)
        own = slice(number * k, (number + 1) * k)
        total[:, own, own] += FLOOR / len(one) * torch.einsum("lpa,lpb->pab", even, even).double()
    return total


def _directions(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give squared singular values of ``weight covariance^1/2`` and left vectors.

    Returns:
        float64 ``[p, s]``, descending, and float32 ``[p, n_out, s]``.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    product = weight @ root  # [p, n_out, m k]
    energies, right = torch.linalg.eigh(product.mT @ product)
    energies, right = energies.flip(1).clamp(min=0), right.flip(2)
    left = product @ right
    length = left.norm(dim=1, keepdim=True)
    size = length.amax(2, keepdim=True).clamp(min=1e-30)
    left = torch.where(length > 1e-9 * size, left / length.clamp(min=1e-30), torch.zeros_like(left))
    return torch.where(length[:, 0] > 1e-9 * size[:, 0], energies, torch.zeros_like(energies)), left.float()
