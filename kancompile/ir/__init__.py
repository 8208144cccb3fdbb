"""What a file computes: programs, the nodes and operators they consist of, their law, and their text."""

from kancompile.ir.basis_parts import LARGEST_PART, MOST_SHIFT, BasisParts
from kancompile.ir.block_codes import BlockCodes, round_to_blocks
from kancompile.ir.check import check
from kancompile.ir.column_lookup import PAIRED_FROM, fits_columns, functions_major, gains_by_columns, reorders_columns
from kancompile.ir.column_order import MOST_PLANES, constant_block, is_in_planes, plane_order, varying_functions
from kancompile.ir.contraction import AnyContraction, Contraction, convolve_real
from kancompile.ir.distinct import distinct_inputs
from kancompile.ir.dynamic_export import export_dynamic
from kancompile.ir.expansion import AnyExpansion, Branch, Expansion, regroup, to_channels_first, to_channels_last
from kancompile.ir.external_data import (
    EXTERNAL_SUFFIX,
    MOST_FILE_BYTES,
    ModelWithExternalData,
    external_tensors,
    file_bytes,
)
from kancompile.ir.geometry import Geometry, PatchSampler, columns_of_groups, flat_weight, group_order, split_groups
from kancompile.ir.gradients import differentiable, quantized
from kancompile.ir.index import REAL, HandOver, IndexQuantizer, rows_of
from kancompile.ir.integer_contraction import TRITS, GroupMultiplier, IntegerContraction
from kancompile.ir.joint_table import JointTable
from kancompile.ir.named_tensors import (
    NamedTensors,
    Values,
    arrays_of,
    by_name,
    concatenated,
    first_of,
    joined,
    tensors_of,
)
from kancompile.ir.operator_names import operator_name
from kancompile.ir.operators import convolution_columns, look_up
from kancompile.ir.packed_codes import DIGITS, MOST, ZERO_POINT, pack
from kancompile.ir.polynomial import BreakpointCells, PolynomialExpansion, UniformCells, Zone
from kancompile.ir.program import ORDINARY, Input, Interface, Layer, PassChange, Program, Unrecognized, attribute
from kancompile.ir.recurrence import GATES, RECURRENCES, onnx_gates
from kancompile.ir.show import show, with_history
from kancompile.ir.smooth_codes import SmoothCodes, smooth_codes
from kancompile.ir.table import TableExpansion, packing_saves
from kancompile.ir.uses import share_uses
from kancompile.ir.wiring import (
    branch_of_column,
    contraction_in_front,
    layer_tables,
    nodes_of,
    quantizer_in_front,
    readers_behind,
    reads_one_convolution,
    single_table_behind,
    tables_behind,
    tied_columns,
)

__all__ = [
    "DIGITS",
    "EXTERNAL_SUFFIX",
    "GATES",
    "LARGEST_PART",
    "MOST",
    "MOST_FILE_BYTES",
    "MOST_PLANES",
    "MOST_SHIFT",
    "ORDINARY",
    "PAIRED_FROM",
    "REAL",
    "RECURRENCES",
    "TRITS",
    "ZERO_POINT",
    "AnyContraction",
    "AnyExpansion",
    "BasisParts",
    "BlockCodes",
    "Branch",
    "BreakpointCells",
    "Contraction",
    "Expansion",
    "Geometry",
    "GroupMultiplier",
    "HandOver",
    "IndexQuantizer",
    "Input",
    "IntegerContraction",
    "Interface",
    "JointTable",
    "Layer",
    "ModelWithExternalData",
    "NamedTensors",
    "PassChange",
    "PatchSampler",
    "PolynomialExpansion",
    "Program",
    "SmoothCodes",
    "TableExpansion",
    "UniformCells",
    "Unrecognized",
    "Values",
    "Zone",
    "arrays_of",
    "attribute",
    "branch_of_column",
    "by_name",
    "check",
    "columns_of_groups",
    "concatenated",
    "constant_block",
    "contraction_in_front",
    "convolution_columns",
    "convolve_real",
    "differentiable",
    "distinct_inputs",
    "export_dynamic",
    "external_tensors",
    "file_bytes",
    "first_of",
    "fits_columns",
    "flat_weight",
    "functions_major",
    "gains_by_columns",
    "group_order",
    "is_in_planes",
    "joined",
    "layer_tables",
    "look_up",
    "nodes_of",
    "onnx_gates",
    "operator_name",
    "pack",
    "packing_saves",
    "plane_order",
    "quantized",
    "quantizer_in_front",
    "readers_behind",
    "reads_one_convolution",
    "regroup",
    "reorders_columns",
    "round_to_blocks",
    "rows_of",
    "share_uses",
    "show",
    "single_table_behind",
    "smooth_codes",
    "split_groups",
    "tables_behind",
    "tensors_of",
    "tied_columns",
    "to_channels_first",
    "to_channels_last",
    "varying_functions",
    "with_history",
]
