"""Settings of the front end's tests."""

import torch

torch.set_num_threads(1)  # the tensors here are tiny
