"""Settings of the whole suite."""

from __future__ import annotations

import torch

pytest_plugins = ["tests.needs"]  # the mark of tests that need optional tools

# small tensors gain nothing from threads, and on a busy machine lose several times their own cost to them
torch.set_num_threads(1)
