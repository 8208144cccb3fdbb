"""What users bring: models, weights and samples, read without running code from files, and checked."""

from kancompile.data.calibration import LEAST_TO_SPLIT, Calibration, load_calibration, stream_batches
from kancompile.data.data_sources import open_data
from kancompile.data.evaluation_mode import evaluation_mode
from kancompile.data.exported_file import load_exported
from kancompile.data.float32_copy import float32_by_default, in_float32, precision_note
from kancompile.data.held_out import DividedSamples, read_divided
from kancompile.data.model import Reference, evaluating, load_model, parameter_bytes, parse_factory_args
from kancompile.data.sample_arrays import shape_hint
from kancompile.data.state_dict import load_state_dict
from kancompile.data.tables import TABLES, read_table
from kancompile.data.trial_run import check_fits, check_one_input

__all__ = [
    "LEAST_TO_SPLIT",
    "TABLES",
    "Calibration",
    "DividedSamples",
    "Reference",
    "check_fits",
    "check_one_input",
    "evaluating",
    "evaluation_mode",
    "float32_by_default",
    "in_float32",
    "load_calibration",
    "load_exported",
    "load_model",
    "load_state_dict",
    "open_data",
    "parameter_bytes",
    "parse_factory_args",
    "precision_note",
    "read_divided",
    "read_table",
    "shape_hint",
    "stream_batches",
]
