"""Measure what a report says, as plain data."""

from kancompile.reporting.facts.beside import computes_in_float, worse_than_float
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.facts.file_difference import describe_difference, difference_table
from kancompile.reporting.facts.goal import goal_missed, needs_int16
from kancompile.reporting.facts.inspection import (
    describe_file,
    describe_manifest,
    describe_program,
    file_table,
    manifest_table,
    program_table,
    read_manifest,
    torn_pair,
)
from kancompile.reporting.facts.layer_facts import functions_text, kernels_of
from kancompile.reporting.facts.layer_kinds import count_layers, float_text, not_layers
from kancompile.reporting.facts.source import calibration_hash, of_compiled, of_file, recipe_and_seed

__all__ = [
    "ReportOptions",
    "calibration_hash",
    "collect",
    "computes_in_float",
    "count_layers",
    "describe_difference",
    "describe_file",
    "describe_manifest",
    "describe_program",
    "difference_table",
    "file_table",
    "float_text",
    "functions_text",
    "goal_missed",
    "kernels_of",
    "manifest_table",
    "needs_int16",
    "not_layers",
    "of_compiled",
    "of_file",
    "program_table",
    "read_manifest",
    "recipe_and_seed",
    "torn_pair",
    "worse_than_float",
]
