"""The two kinds of node that a KAN layer consists of, in each form that a program can hold them.

Every KAN layer is a pointwise *expansion* followed by one linear *contraction*::

    phi[b, i, k] = basis_k(x[b, i])
    y[b, o]      = bias[o] + sum over i, k of weight[o, (i, k)] * phi[b, i, k]

Forms of an expansion (``kancompile.ir.expansion``): :class:`Expansion` (the captured float region) and
:class:`TableExpansion` (integer look-up). Forms of a contraction: :class:`Contraction` (float) and
:class:`QuantizedContraction` (integer codes); where the contraction is a convolution over pixels,
``ConvContraction`` and ``QuantizedConvContraction`` of ``kancompile.ir.convolution``.

Modules are values: passes build new ones and never write to an existing one. Shapes use ``b`` for the batch, ``*`` for
leading dimensions that a layer treats alike (tokens), ``n_in``, ``k`` functions per input, ``c = sum of n_in * k``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kancompile.ir.block_codes import BlockCodes
from kancompile.ir.expansion import Branch, Expansion, regroup
from kancompile.ir.index import IndexQuantizer
from kancompile.ir.table import TableExpansion

__all__ = [
    "Branch",
    "Contraction",
    "Expansion",
    "GroupMultiplier",
    "IndexQuantizer",
    "QuantizedContraction",
    "TableExpansion",
]


class Contraction(nn.Module):
    """A float contraction of one or more expansions, ``y = weight @ phi + bias``.

    It reads real basis values, or the codes of a table, whose scale and offset then are part of weight and bias.

    Attributes:
        layer: name of the layer in the user's model, such as ``"layers.0"``.
        weight: float32 ``[n_out, c]``; columns are the expansions in order, inputs major, functions minor.
        bias: float32 ``[n_out]``.
        out_shape: shape of the output without the batch; ``(*, n_out)`` regrouped.
        codes: the weight as 16-bit codes, whose values ``weight`` holds; ``None`` for any other weight.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, layer: str, weight: Tensor, bias: Tensor, out_shape: Sequence[int], codes: BlockCodes | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.codes = codes
        self.out_shape = tuple(out_shape)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[0])

    def forward(self, *features: Tensor) -> Tensor:
        """Map features ``[b, *, n_in, k]`` to ``[b, *out_shape]``."""
        flat = [feature.flatten(-2).to(self.weight.dtype) for feature in features]
        if len(flat) == 1:
            return regroup(nn.functional.linear(flat[0], self.weight, self.bias), self.out_shape)
        # one product for each expansion: adding results costs less than copying features side by side
        parts = torch.split(self.weight, [feature.shape[-1] for feature in flat], 1)
        y = nn.functional.linear(flat[0], parts[0], self.bias)
        for feature, part in zip(flat[1:], parts[1:], strict=True):
            y = y + nn.functional.linear(feature, part)
        return regroup(y, self.out_shape)


@dataclass(frozen=True)
class GroupMultiplier:
    """Whole factors by which groups of columns differ in scale, already multiplied into the weights.

    Attributes:
        factors: int8 ``[g, n_out]``, positive.
        group_sizes: columns of each group, in order.
    """

    factors: Tensor
    group_sizes: tuple[int, ...]

    def of_column(self) -> Tensor:
        """Spread the factors to one for every weight, int8 ``[c, n_out]``."""
        return torch.repeat_interleave(self.factors, torch.tensor(self.group_sizes), dim=0)


class QuantizedContraction(nn.Module):
    """An integer contraction of table codes.

    Attributes:
        layer, out_shape: as in :class:`Contraction`.
        weight_bits: width of the weight codes, 2 to 8.
        multiplier: factors that are part of the weights, ``None`` where there are none: weights are codes of
            ``weight_bits`` bits times their group's factor, and a file may store both apart.
        group_sizes: columns of each scale group, in order.
        bias: int32 ``[n_out]`` in units of the first group's scale.
        output: ``None`` for real outputs, or the index quantizer of the next expansion, whose row numbers it returns.
    """

    bias: Tensor

    def __init__(
        self,
        layer: str,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        out_shape: Sequence[int],
        weight_bits: int = 8,
        group_sizes: Sequence[int] | None = None,
        output: IndexQuantizer | None = None,
        multiplier: GroupMultiplier | None = None,
    ) -> None:
        """Take ``weight`` int8 ``[c, n_out]`` and ``scale`` float32 ``[g, n_out]``."""
        super().__init__()
        self.layer = layer
        self.out_shape = tuple(out_shape)
        self.weight_bits = weight_bits
        self.group_sizes = tuple(group_sizes or (weight.shape[0],))
        self.output = output
        self.multiplier = multiplier
        self.register_buffer("bias", bias)
        for group, part in enumerate(weight.split(self.group_sizes)):
            self.register_buffer(f"weight_{group}", part.contiguous())
            self.register_buffer(f"scale_{group}", scale[group].contiguous())

    @property
    def weights(self) -> list[Tensor]:
        """Codes of each group, int8 ``[c_g, n_out]``."""
        return [self.get_buffer(f"weight_{group}") for group in range(len(self.group_sizes))]

    @property
    def scales(self) -> list[Tensor]:
        """Scale of each group, float32 ``[n_out]``."""
        return [self.get_buffer(f"scale_{group}") for group in range(len(self.group_sizes))]

    @property
    def product_bits(self) -> int:
        """Bits that hold the weights as they are multiplied: ``weight_bits``, or 8 where factors are part of them."""
        return self.weight_bits if self.multiplier is None else 8

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return int(self.bias.shape[0])

    def with_output(self, output: IndexQuantizer | None) -> QuantizedContraction:
        """Return the same contraction with another kind of output."""
        return QuantizedContraction(
            self.layer,
            torch.cat(self.weights),
            self.bias,
            torch.stack(self.scales),
            self.out_shape,
            self.weight_bits,
            self.group_sizes,
            output,
            self.multiplier,
        )

    def forward(self, *features: Tensor) -> Tensor:
        """Map table codes, uint8 ``[b, *, n_in, k]``, to ``[b, *out_shape]``: real values or row numbers."""
        y: Tensor
        if self.output is None:
            y = torch.ops.kancompile.contract(list(features), self.weights, self.bias, self.scales, self.weight_bits)
        else:
            y = torch.ops.kancompile.contract_to_index(
                list(features),
                self.weights[0],
                self.bias,
                self.scales[0],
                self.output.scale,
                self.output.zero_point,
                self.output.levels,
                self.weight_bits,
            )
        return regroup(y, self.out_shape)
