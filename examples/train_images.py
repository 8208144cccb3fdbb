"""Train a fully connected KAN on a set of grey images; the common part of the MNIST and Fashion-MNIST examples."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from examples.zoo import efficient_kan, fast_kan

MODELS = {"efficient_kan": efficient_kan.build, "fast_kan": fast_kan.build}


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load images as [n, pixels] in [-1, 1] and their labels [n] from ``x_<split>``, ``y_<split>`` (uint8).

    Raises:
        SystemExit: a key is missing, or the images are not uint8.
    """
    with np.load(path, allow_pickle=False) as arrays:
        missing = {f"x_{split}", f"y_{split}"} - set(arrays.files)
        if missing:
            raise SystemExit(f"{path}: found keys {sorted(arrays.files)!r}, expected also {sorted(missing)!r}")
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8:
        raise SystemExit(f"{path}: found x_{split} of type {images.dtype!s}, expected uint8 pixels")
    pixels = torch.from_numpy(images.reshape(len(images), -1)).float()
    return pixels / 127.5 - 1, torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the share of rows of ``x`` whose largest logit is at ``y``."""
    model.eval()
    correct = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return correct / len(x)


def train_epoch(
    model: nn.Module,
    y: Tensor,
    batches: Sequence[Tensor],
    images_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    name: str,
    after_step: Callable[[], None] = lambda: None,
) -> str:
    """Train in place on the cross-entropy for one pass.

    Args:
        model: a classifier.
        y: classes ``[n]``.
        batches: numbers of the images of each step.
        images_of: gives the images of such numbers.
        optimizer: makes the steps.
        name: of the epoch, such as ``"epoch 1/8"``.
        after_step: called after each.

    Returns:
        a line that says the epoch and its mean loss.
    """
    model.train()
    total = 0.0
    for batch in tqdm(batches, desc=name, disable=None):
        images = images_of(batch)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), y[batch])
        loss.backward()
        optimizer.step()
        after_step()
        total += loss.item() * len(batch)
    return f"{name}: mean training loss {total / len(y):.4f}"


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch_size: int, seed: int) -> None:
    """Train in place with AdamW (rate 1e-3, times 0.8 after every epoch) on the cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(x), generator=generator).split(batch_size)
        said = train_epoch(model, y, batches, x.__getitem__, optimizer, f"epoch {epoch}/{epochs}")
        schedule.step()
        print(said, flush=True)


def main(dataset: str, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Run a training script: parse the arguments, train, write the weights and print the test accuracy.

    Args:
        dataset: name of the data set, for the default output file.
        description: help text of the script.
        argv: arguments, those of the process if None.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an .npz with x_train, y_train, x_test, y_test, all uint8")
    parser.add_argument("--model", choices=sorted(MODELS), default="efficient_kan", help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=64, help="width of the hidden layer (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"file of the weights (default: {dataset}_MODEL.safetensors)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    out = arguments.out or Path(f"{dataset}_{arguments.model}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)

    x, y = load_split(arguments.data, "train")
    model = MODELS[arguments.model]((x.shape[1], arguments.hidden, int(y.max()) + 1), seed=arguments.seed)
    train(model, x, y, arguments.epochs, arguments.batch_size, arguments.seed)
    save_file(model.state_dict(), out)
    x_test, y_test = load_split(arguments.data, "test")
    print(f"{dataset} {arguments.model}: test accuracy {accuracy(model, x_test, y_test):.4f} on {len(x_test)} images")
