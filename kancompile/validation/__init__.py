"""Prove what a file computes, and how fast: outputs, layers, kernels and runtimes side by side."""

from kancompile.validation.benchmark import COMPILED, FLOAT_EXPORT, Benchmark, benchmark, export_float, take_turns
from kancompile.validation.error_measures import ErrorMeasure, TaskMetric, decibel, plain_number
from kancompile.validation.kernel_audit import KernelAudit, audit_kernels
from kancompile.validation.layer_errors import LayerError, LayerErrors
from kancompile.validation.layer_pairs import AnyExpansion, BranchColumns, LayerPair, evaluate_inputs, inputs_last
from kancompile.validation.runtime_comparison import RuntimeComparison, compare_runtimes, runtimes_named
from kancompile.validation.runtime_timing import timed_runtimes
from kancompile.validation.text_table import aligned
from kancompile.validation.validate import Validation, validate

__all__ = [
    "COMPILED",
    "FLOAT_EXPORT",
    "AnyExpansion",
    "Benchmark",
    "BranchColumns",
    "ErrorMeasure",
    "KernelAudit",
    "LayerError",
    "LayerErrors",
    "LayerPair",
    "RuntimeComparison",
    "TaskMetric",
    "Validation",
    "aligned",
    "audit_kernels",
    "benchmark",
    "compare_runtimes",
    "decibel",
    "evaluate_inputs",
    "export_float",
    "inputs_last",
    "plain_number",
    "runtimes_named",
    "take_turns",
    "timed_runtimes",
    "validate",
]
