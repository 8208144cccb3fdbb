"""Training flags of modules, set without calling their methods.

Some classes have a ``train`` of their own, which trains on a data set (pykan 0.0), and ``nn.Module.eval`` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def set_evaluating(model: nn.Module) -> list[nn.Module]:
    """Clear the training flag of every module in a model, and return those that had it set."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    return training


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its flags afterwards."""
    training = set_evaluating(model)
    try:
        yield
    finally:
        for module in training:
            module.training = True
