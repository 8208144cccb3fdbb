"""What users bring: models, weights and samples, read without running code from files, and checked."""

from kancompile.data.calibration import LEAST_TO_SPLIT, Calibration, load_calibration, stream_batches
from kancompile.data.data_sources import open_data
from kancompile.data.dynamic_sizes import read_dynamic
from kancompile.data.entries import ONE
from kancompile.data.evaluation_mode import evaluation_mode
from kancompile.data.exported_file import load_exported, opened
from kancompile.data.float32_copy import float32_by_default, in_float32, precision_note
from kancompile.data.held_out import DividedSamples, read_divided
from kancompile.data.model import Reference, evaluating, load_model, parameter_bytes, parse_factory_args
from kancompile.data.model_inputs import (
    ModelInputs,
    arguments,
    check_arguments,
    dynamic_dimensions,
    in_order,
    model_inputs,
    named_forward,
    register_dataclasses,
)
from kancompile.data.model_outputs import named_leaves, output_names, outputs_of
from kancompile.data.sample_arrays import shape_hint
from kancompile.data.state_dict import load_state_dict
from kancompile.data.tables import TABLES, read_table
from kancompile.data.tensor_names import is_utf8
from kancompile.data.trial_run import check_fits

__all__ = [
    "LEAST_TO_SPLIT",
    "ONE",
    "TABLES",
    "Calibration",
    "DividedSamples",
    "ModelInputs",
    "Reference",
    "arguments",
    "check_arguments",
    "check_fits",
    "dynamic_dimensions",
    "evaluating",
    "evaluation_mode",
    "float32_by_default",
    "in_float32",
    "in_order",
    "is_utf8",
    "load_calibration",
    "load_exported",
    "load_model",
    "load_state_dict",
    "model_inputs",
    "named_forward",
    "named_leaves",
    "open_data",
    "opened",
    "output_names",
    "outputs_of",
    "parameter_bytes",
    "parse_factory_args",
    "precision_note",
    "read_divided",
    "read_dynamic",
    "read_table",
    "register_dataclasses",
    "shape_hint",
    "stream_batches",
]
