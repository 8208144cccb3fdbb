"""Settings of the whole suite."""

from __future__ import annotations

import torch

from tests.exporting_once import keep_what_exporters_read

# the mark of tests that need optional tools, and that of cases that take long
pytest_plugins = ["tests.needs", "tests.slow_cases"]

# small tensors gain nothing from threads, and on a busy machine lose several times their own cost to them
torch.set_num_threads(1)
keep_what_exporters_read()
