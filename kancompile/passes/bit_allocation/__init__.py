"""Give every layer its weight bits by HAWQ-V2 sensitivities under a budget."""

from kancompile.passes.bit_allocation.allocate_bits import allocate_bits, front_table, measure_sensitivities
from kancompile.passes.bit_allocation.allocation import Allocation

__all__ = [
    "Allocation",
    "allocate_bits",
    "front_table",
    "measure_sensitivities",
]
