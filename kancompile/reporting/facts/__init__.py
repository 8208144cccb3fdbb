"""Measure what a report says, as plain data."""

from kancompile.reporting.facts.baseline import parameter_bytes
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.facts.inspection import (
    describe_file,
    describe_manifest,
    describe_program,
    file_table,
    manifest_table,
    program_table,
)
from kancompile.reporting.facts.layer_facts import kernels_of
from kancompile.reporting.facts.source import calibration_hash, of_compiled, of_file, recipe_and_seed

__all__ = [
    "ReportOptions",
    "calibration_hash",
    "collect",
    "describe_file",
    "describe_manifest",
    "describe_program",
    "file_table",
    "kernels_of",
    "manifest_table",
    "of_compiled",
    "of_file",
    "parameter_bytes",
    "program_table",
    "recipe_and_seed",
]
