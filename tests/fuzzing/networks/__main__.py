"""``python -m tests.fuzzing.networks``; see :mod:`tests.fuzzing.networks.run`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch.onnx._internal.exporter import _registration

from tests.exporting_once import keep_what_exporters_read
from tests.fuzzing.networks.run import run

parser = argparse.ArgumentParser(
    prog="python -m tests.fuzzing.networks", description="compile networks drawn at random"
)
parser.add_argument("--programs", type=int, default=2000, help="number at which to end (default 2000)")
parser.add_argument("--seconds", type=float, default=1e9, help="after which no further program begins")
parser.add_argument("--shrink", type=float, default=600, help="seconds to make a failure smaller (default 600)")
parser.add_argument(
    "--log", type=Path, default=Path("fuzz-networks.json"), help="what was found; a run goes on where it ends"
)
parser.add_argument("--recipes", type=int, default=4, help="programs of every network (default 4)")
options = parser.parse_args()
warnings.simplefilter("ignore")
torch.set_num_threads(1)
keep_what_exporters_read()
_registration.ONNXRegistry.from_torchlib()  # once, before processes fork
sys.exit(min(1, run(options.programs, options.seconds, options.log, options.shrink, options.recipes)))
