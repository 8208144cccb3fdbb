"""Reports: everything about a compiled model on one page, as plain data and for people."""

from kancompile.reporting.facts import (
    ReportOptions,
    calibration_hash,
    collect,
    describe_file,
    describe_manifest,
    describe_program,
    edge_of,
    file_table,
    manifest_table,
    of_compiled,
    of_file,
    program_table,
    read_manifest,
    recipe_and_seed,
    torn_pair,
)
from kancompile.reporting.render import check_matplotlib, compile_summary, render, text_plot

__all__ = [
    "ReportOptions",
    "calibration_hash",
    "check_matplotlib",
    "collect",
    "compile_summary",
    "describe_file",
    "describe_manifest",
    "describe_program",
    "edge_of",
    "file_table",
    "manifest_table",
    "of_compiled",
    "of_file",
    "program_table",
    "read_manifest",
    "recipe_and_seed",
    "render",
    "text_plot",
    "torn_pair",
]
