"""Train the convolutional KAGN classifier (3-16-32-64-64 channels) on CIFAR-10.

Run from the root of the repository, with an .npz of x_train, y_train, x_test, y_test (uint8, images [n, 32, 32, 3])::

    python -m examples.train_cifar10 cifar10.npz --epochs 8 --out cifar10_kagn.safetensors

Writes the weights after every epoch, so a run that is cut short leaves a usable file.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.train_images import accuracy, train_epoch
from examples.zoo import kagn_conv

CROP_PADDING = 4


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load images as float [n, 3, 32, 32] in [-1, 1] and their labels [n].

    Raises:
        SystemExit: a key is missing, or the images are not uint8 RGB of 32x32 pixels.
    """
    with np.load(path, allow_pickle=False) as arrays:
        missing = {f"x_{split}", f"y_{split}"} - set(arrays.files)
        if missing:
            raise SystemExit(f"{path}: found keys {sorted(arrays.files)!r}, expected also {sorted(missing)!r}")
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise SystemExit(f"{path}: found x_{split} {images.dtype!s} {images.shape!r}, expected uint8 [n, 32, 32, 3]")
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.from_numpy(labels.astype(np.int64))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to ``CROP_PADDING`` pixels (mirrored at the border) and flip half of them."""
    n, _, height, width = x.shape
    padded = functional.pad(x, [CROP_PADDING] * 4, mode="reflect")
    shift = torch.randint(2 * CROP_PADDING + 1, (2, n, 1), generator=generator)
    row = shift[0] + torch.arange(height)
    column = shift[1] + torch.arange(width)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    column = torch.where(flipped, column.flip(1), column)
    image = torch.arange(n).reshape(n, 1, 1)
    # the index tensors are separated by the channel slice, so their dimensions come first: [n, height, width, 3]
    return padded[image, :, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch_size: int = 88,
    rate: float = 5e-3,
    seed: int = 0,
    after_epoch: Callable[[str], None] = print,
) -> None:
    """Train in place with AdamW and one cycle of the rate on shifted and flipped images.

    Args:
        model: a classifier of images ``[n, 3, 32, 32]``.
        x, y: images and classes.
        epochs, batch_size, seed: of the training.
        rate: the highest rate.
        after_epoch: called with a line that says the epoch and its loss.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    steps = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, epochs=epochs, steps_per_epoch=steps, pct_start=0.25
    )

    def images_of(batch: Tensor) -> Tensor:
        # channels_last images make the convolutions on a CPU about 1.6 times faster
        return augment(x[batch], generator).contiguous(memory_format=torch.channels_last)

    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(x), generator=generator).split(batch_size)
        after_epoch(train_epoch(model, y, batches, images_of, optimizer, f"epoch {epoch}/{epochs}", schedule.step))


def main(dataset: str, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Train, write the weights after every epoch and print the test accuracy.

    Args:
        dataset: name of the data set, for the default output file.
        description: help text of the script.
        argv: arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz with x_train, y_train, x_test, y_test, all uint8")
    parser.add_argument("--epochs", type=int, default=8, help="passes of the training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=88, help="images a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="highest rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file of the weights (default: {dataset}_kagn.safetensors)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    out = arguments.out or Path(f"{dataset}_kagn.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)

    x, y = load_split(arguments.data, "train")
    x_test, y_test = load_split(arguments.data, "test")
    model = kagn_conv.build(n_classes=int(y.max()) + 1, seed=arguments.seed)

    def after_epoch(line: str) -> None:
        save_file(model.state_dict(), out)
        found = accuracy(model, x_test, y_test, batch_size=250)
        print(f"{line}, test accuracy {found:.4f} on {len(x_test)} images", flush=True)

    rate, seed = arguments.learning_rate, arguments.seed
    train(model, x, y, arguments.epochs, arguments.batch_size, rate, seed, after_epoch)


if __name__ == "__main__":
    main("cifar10", __doc__)
