"""Prove what a file computes, and how fast: outputs, layers, kernels and runtimes side by side."""

from kancompile.validation.benchmark import COMPILED, FLOAT_EXPORT, Benchmark, benchmark
from kancompile.validation.beside_float import BesideFloat, measure_beside_float
from kancompile.validation.dead_columns import dead_columns
from kancompile.validation.edge_functions import (
    PAPER,
    Edge,
    EdgeName,
    Observation,
    Outside,
    Palette,
    check_matplotlib,
    draw_edge,
    edge_of,
    evaluate_edges,
    important_edges,
    observe,
    parse_edge,
    plot,
)
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
    "PAPER",
    "RUINED_DB",
    "Benchmark",
    "BesideFloat",
    "BranchColumns",
    "Edge",
    "EdgeName",
    "ErrorMeasure",
    "FloatExport",
    "FloatReplay",
    "KernelAudit",
    "LayerError",
    "LayerErrors",
    "LayerPair",
    "Observation",
    "OutputError",
    "Outside",
    "PairedDecisions",
    "Palette",
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
    "check_matplotlib",
    "compare_runtimes",
    "costs_of",
    "dead_columns",
    "decibel",
    "draw_edge",
    "drop_of",
    "edge_of",
    "evaluate_edges",
    "export_float",
    "important_edges",
    "measure_beside_float",
    "measure_costs",
    "number_of",
    "observe",
    "outside_grid",
    "parse_edge",
    "plain_number",
    "plot",
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
