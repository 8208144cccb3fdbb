"""A convolutional KAN from training to a validated integer file, in under a minute on one core.

Run from the root of the repository (needs scikit-learn)::

    python -m examples.conv_classifier --out conv_digits.onnx

Trains three KAGN convolutions (Gram polynomials of ``tanh``, batch normalisation) on scikit-learn's 8x8 digits, compiles them to
integer convolutions, and checks the file in ONNX Runtime against PyTorch on images that neither training nor calibration saw.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import kancompile
from examples.zoo import kagn_conv
from kancompile.validation import Validation

N_TEST = 450
N_CALIBRATION = 256


def load_images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the digits: training images and labels, test images and labels; images [n, 1, 8, 8] in [-1, 1]."""
    pixels, labels = load_digits(return_X_y=True)  # 0 ... 16
    order = np.random.default_rng(seed).permutation(len(pixels))
    x = torch.from_numpy((pixels[order] / 8 - 1).astype(np.float32)).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order].astype(np.int64))
    return x[N_TEST:], y[N_TEST:], x[:N_TEST], y[:N_TEST]


def train(x: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train a classifier of 1-16-32-32 channels on images [n, 1, 8, 8] and labels [n]."""
    model = kagn_conv.build(channels=(1, 16, 32, 32), strides=(1, 2, 1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    batches = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs=epochs, steps_per_epoch=batches)
    for _ in tqdm(range(epochs), desc="epochs", disable=None):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> Validation:
    """Train, compile, save, validate, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--weight-bits", type=int, default=8, help="2 to 8 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    parser.add_argument("--out", type=Path, default=Path("conv_digits.onnx"), help="default: %(default)s")
    chosen = parser.parse_args(arguments)

    x, y, x_test, y_test = load_images(chosen.seed)
    model = train(x, y, chosen.epochs, chosen.seed)
    compiled = kancompile.compile(
        model, x[:N_CALIBRATION], recipe={"weight_bits": chosen.weight_bits}, seed=chosen.seed
    )
    path = compiled.save(chosen.out, force=True)
    result = kancompile.validate(
        path, model, (x_test, y_test), program=compiled.program, float_program=compiled.captured
    )
    print(result.table())
    print(compiled.audit.table())
    return result


if __name__ == "__main__":
    main()
