"""Train small models briefly on scikit-learn's 8x8 digits, so that what is measured has the weights of trained networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

N_TEST = 450


@dataclass(frozen=True)
class Digits:
    """The digits, pixels scaled to -1 ... 1, in a seeded order.

    Attributes:
        x_train, x_test: float32 ``[n, *shape]``.
        y_train, y_test: int64 ``[n]``.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class FamilyModel:
    """A model of some family that classifies digits.

    Attributes:
        family: how tables call it.
        source: module or package that defines it.
        build: factory, which may draw from the global random state.
        shape: of one input, 64 elements.
        epochs, learning_rate: of its training.
        limits: what a reader should know beside the figures.
    """

    family: str
    source: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (64,)
    epochs: int = 8
    learning_rate: float = 2e-3
    limits: str = ""


def load(shape: Sequence[int], seed: int = 0) -> Digits:
    """Load the digits as vectors ``(64,)``, images ``(1, 8, 8)`` or anything else of 64 elements."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    x = (torch.from_numpy(pixels).float()[order] / 8 - 1).reshape(-1, *shape)
    y = torch.from_numpy(labels).long()[order]
    return Digits(x[N_TEST:], y[N_TEST:], x[:N_TEST], y[:N_TEST])


def build_seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Call a factory that draws from the global random state, which is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def train(model: nn.Module, digits: Digits, epochs: int, learning_rate: float = 2e-3, seed: int = 0) -> float:
    """Train by AdamW on cross-entropy; leave the model in evaluation mode.

    Returns:
        accuracy on the test images in percent.

    Raises:
        RuntimeError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    steps = epochs * -(-len(digits.x_train) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout draws from the global state
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.x_train), generator=generator).split(64):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
                if not bool(torch.isfinite(loss)):
                    raise RuntimeError("training: found a loss that is not finite, expected a finite one; train slower")
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(digits.x_test).argmax(1) == digits.y_test).float().mean())
