"""Prove what a file computes, and how fast: outputs, layers, kernels and runtimes side by side."""

from kancompile.validation.benchmark import COMPILED, FLOAT_EXPORT, Benchmark, benchmark
from kancompile.validation.beside_float import BesideFloat, measure_beside_float
from kancompile.validation.dead_columns import dead_columns
from kancompile.validation.error_measures import ErrorMeasure, OutputError, decibel, plain_number
from kancompile.validation.float_export import FloatExport, export_float
from kancompile.validation.float_replay import FloatReplay, samples_that_fit
from kancompile.validation.input_region import outside_grid, read_from_input
from kancompile.validation.kernel_audit import KernelAudit, audit_kernels
from kancompile.validation.layer_errors import LayerError, LayerErrors
from kancompile.validation.layer_pairs import BranchColumns, LayerPair, branch_columns
from kancompile.validation.measured_costs import costs_of, measure_costs
from kancompile.validation.operator_probes import Probe, probes
from kancompile.validation.paired_decisions import PairedDecisions
from kancompile.validation.runtime_comparison import RuntimeComparison, compare_runtimes, runtimes_named
from kancompile.validation.runtime_timing import timed_runtimes
from kancompile.validation.task_metrics import CLASSES, Score, TaskMetric, number_of, points, title
from kancompile.validation.text_table import Printed, aligned
from kancompile.validation.validate import RUINED_DB, Validation, drop_of, validate, worst_text

__all__ = [
    "CLASSES",
    "COMPILED",
    "FLOAT_EXPORT",
    "RUINED_DB",
    "Benchmark",
    "BesideFloat",
    "BranchColumns",
    "ErrorMeasure",
    "FloatExport",
    "FloatReplay",
    "KernelAudit",
    "LayerError",
    "LayerErrors",
    "LayerPair",
    "OutputError",
    "PairedDecisions",
    "Printed",
    "Probe",
    "RuntimeComparison",
    "Score",
    "TaskMetric",
    "Validation",
    "aligned",
    "audit_kernels",
    "benchmark",
    "branch_columns",
    "compare_runtimes",
    "costs_of",
    "dead_columns",
    "decibel",
    "drop_of",
    "export_float",
    "measure_beside_float",
    "measure_costs",
    "number_of",
    "outside_grid",
    "plain_number",
    "points",
    "probes",
    "read_from_input",
    "runtimes_named",
    "samples_that_fit",
    "timed_runtimes",
    "title",
    "validate",
    "worst_text",
]
