"""What users catch, and how whatever breaks on foreign content becomes one of these errors."""

from kancompile.errors.exceptions import KanCompileError, ThresholdMissedError, printable
from kancompile.errors.foreign import (
    check_depth,
    check_form,
    first_line,
    foreign,
    naming_file,
    parse_json,
    parse_literal,
    read_bytes,
    read_text,
    reason,
    shown,
)
from kancompile.errors.source_lines import FRAME, error_source, innermost_line

__all__ = [
    "FRAME",
    "KanCompileError",
    "ThresholdMissedError",
    "check_depth",
    "check_form",
    "error_source",
    "first_line",
    "foreign",
    "innermost_line",
    "naming_file",
    "parse_json",
    "parse_literal",
    "printable",
    "read_bytes",
    "read_text",
    "reason",
    "shown",
]
