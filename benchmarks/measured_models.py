"""The two networks whose speed is measured, with their data."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.train_images import load_split, train
from examples.zoo import efficient_kan

CALIBRATION_SAMPLES = 1000
MNIST_WIDTHS = (784, 64, 10)
WIDE_WIDTHS = (512, 512, 512)


@dataclass(frozen=True)
class MeasuredModel:
    """A float model with data.

    Attributes:
        name: how tables call it.
        model: in evaluation mode.
        calibration: ``[1000, n_in]``, the same samples for every quantizer.
        test: ``[n, n_in]``, none of them in ``calibration``.
        labels: int64 ``[n]``, or ``None``.
    """

    name: str
    model: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Tensor | None


def mnist_model(data: Path, checkpoint: Path | None, epochs: int) -> MeasuredModel:
    """Load efficient-KAN 784-64-10 (grid 5, order 3), or train it on ``mnist.npz`` in the folder ``data``.

    Raises:
        SystemExit: a file is missing.
    """
    images = data / "mnist.npz"
    for path in (images, checkpoint):
        if path is not None and not path.is_file():
            raise SystemExit(f"{path}: no such file")
    x, y = load_split(images, "train")
    model = efficient_kan.build(MNIST_WIDTHS)
    if checkpoint is None:
        train(model, x, y, epochs, batch_size=64, seed=0)
    else:
        model.load_state_dict(load_file(checkpoint))
    test, labels = load_split(images, "test")
    return MeasuredModel("efficient-KAN 784-64-10", model.eval(), x[:CALIBRATION_SAMPLES], test, labels)


def wide_model() -> MeasuredModel:
    """Build efficient-KAN 512-512-512 with seeded random weights, and uniform random inputs in -1 ... 1."""
    model = efficient_kan.build(WIDE_WIDTHS, seed=0)
    x = torch.rand(2 * CALIBRATION_SAMPLES, WIDE_WIDTHS[0], generator=torch.Generator().manual_seed(1)) * 2 - 1
    calibration, test = x.split(CALIBRATION_SAMPLES)
    return MeasuredModel("efficient-KAN 512-512-512", model.eval(), calibration, test, labels=None)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`mnist_model` takes, and those of every timing."""
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--checkpoint", type=Path, help="weights of the MNIST model (.safetensors), else it is trained")
    parser.add_argument("--epochs", type=int, default=8, help="passes of training without --checkpoint")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 256], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=60, help="blocks of 5 ms a candidate (default: %(default)s)")


def measured_models(arguments: argparse.Namespace) -> list[MeasuredModel]:
    """Make both models as the arguments say."""
    return [mnist_model(arguments.data, arguments.checkpoint, arguments.epochs), wide_model()]
