"""Computing to the same digits on machines of one core and of many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Compute in one thread of PyTorch meanwhile.

    Threads share a sum out among them, so that its last digits depend on their number. What is measured so decides about bits and
    stands in the manifest, what is learned from gradients so becomes codes: the same model is to give the same file everywhere.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
