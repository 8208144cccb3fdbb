"""What a recipe says about the weights of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kancompile.passes.rounding_methods import WIDEST_BITS, Method, Width, stored_bits


@dataclass(frozen=True)
class RoundingOptions:
    """What a recipe says about the weights of one layer.

    Attributes:
        method: a rounding method.
        method_name: how reports call it.
        bits: 2 to 8, or ternary.
        granularity: ``"channel"``: one scale for each output; ``"branch"``: and for each expansion the layer reads;
            ``"group"``: and for each ``group_size`` inputs.
        group_size: inputs in a group.
        int16_pairs: whether sums of two neighboring products must fit int16 (see ``limit_pairs``).
        alternatives: methods by name that are tried where ``method``, rounding to nearest, limits the layer.
        makes_up: whether the weights are changed first so that they make up for drift (see ``drift``).
    """

    method: Method
    method_name: str
    bits: Width = 8
    granularity: str = "channel"
    group_size: int | None = None
    int16_pairs: bool = False
    alternatives: Mapping[str, Method] = field(default_factory=dict)
    makes_up: bool = False

    @property
    def weights(self) -> str:
        """Its weights, in words."""
        return f"{self.bits}-bit weights" if isinstance(self.bits, int) else f"{self.bits} weights"

    @property
    def shares_scale(self) -> bool:
        """Whether the scales of groups are whole multiples of one, so that the layer stays one product."""
        return self.granularity == "group" and stored_bits(self.bits) <= WIDEST_BITS
