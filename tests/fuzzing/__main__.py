"""``python -m tests.fuzzing``; see :mod:`tests.fuzzing.fuzz`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

from tests.fuzzing.fuzz import run
from tests.fuzzing.readers import CASES

parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description="change files at random and read them")
parser.add_argument("readers", nargs="*", metavar="READER", help=f"all, or some of {', '.join(CASES)}")
parser.add_argument("--seconds", type=float, default=1200, help="processor time for each reader (default 1200)")
parser.add_argument("--inputs", type=int, default=200_000, help="inputs after which a reader is done (default 200,000)")
parser.add_argument("--log", type=Path, default=Path("fuzz.json"), help="what was found; a run goes on where it ends")
options = parser.parse_args()
if unknown := [name for name in options.readers if name not in CASES]:
    parser.error(f"found no reader {unknown[0]!r}, expected some of {', '.join(CASES)}")
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.exit(min(1, run(options.readers, options.seconds, options.inputs, options.log)))
