"""Rewrites of programs, one in a file, and the methods that round weights."""

from kancompile.passes.bit_allocation import (
    Allocation,
    allocate_bits,
    front_table,
    measure_sensitivities,
)
from kancompile.passes.guard_nan import GuardNaN
from kancompile.passes.look_up_members import LookUpMembers
from kancompile.passes.lower_to_polynomials import ObserveRegion
from kancompile.passes.lowering import Lowering, check_pairs, lower, prepare, settle
from kancompile.passes.one_thread import in_one_thread
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.passes.recently_used import RecentlyUsed
from kancompile.passes.reduce_functions import time_of_each, time_of_joint
from kancompile.passes.round_weights import cost_of_pairs, layer_limits, prove_layer
from kancompile.passes.rounding_methods import code_range, method_named, quick_methods
from kancompile.passes.split_branches import SplitBranches

__all__ = [
    "Allocation",
    "GuardNaN",
    "LookUpMembers",
    "Lowering",
    "ObserveRegion",
    "QuantizeOutputs",
    "RecentlyUsed",
    "SplitBranches",
    "allocate_bits",
    "check_pairs",
    "code_range",
    "cost_of_pairs",
    "front_table",
    "in_one_thread",
    "layer_limits",
    "lower",
    "measure_sensitivities",
    "method_named",
    "prepare",
    "prove_layer",
    "quick_methods",
    "settle",
    "time_of_each",
    "time_of_joint",
]
