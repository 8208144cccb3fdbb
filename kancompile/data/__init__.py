"""What users bring: models, weights and samples, read without running code from files, and checked."""

from kancompile.data.calibration import LEAST_TO_SPLIT, Calibration, load_calibration, stream_batches
from kancompile.data.data_sources import open_data
from kancompile.data.exported_file import load_exported
from kancompile.data.model import Reference, check_fits, evaluating, load_model, parse_factory_args
from kancompile.data.sample_arrays import shape_hint
from kancompile.data.state_dict import load_state_dict

__all__ = [
    "LEAST_TO_SPLIT",
    "Calibration",
    "Reference",
    "check_fits",
    "evaluating",
    "load_calibration",
    "load_exported",
    "load_model",
    "load_state_dict",
    "open_data",
    "parse_factory_args",
    "shape_hint",
    "stream_batches",
]
