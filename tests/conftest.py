"""Settings of the whole suite."""

from __future__ import annotations

import torch

# small tensors gain nothing from threads, and on a busy machine lose several times their own cost to them
torch.set_num_threads(1)
