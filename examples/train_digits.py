"""Train the demo checkpoint: efficient-KAN 64-64-10 on scikit-learn's 8x8 digits.

Run from the root of the repository::

    python -m examples.train_digits

Writes ``efficient_kan_digits.safetensors``, ``digits_calibration.npz`` (x, y: part of the training images) and
``digits_test.npz`` (x, y: images never trained on) to ``examples/digits``.  Needs scikit-learn.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional
from tqdm import tqdm

from examples.zoo import efficient_kan

N_TEST = 450
N_CALIBRATION = 256


def main() -> None:
    """Train, report the test accuracy and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="first rate of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits", help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a net this small is slower with more

    pixels, labels = load_digits(return_X_y=True)  # 0 ... 16
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(pixels), generator=generator).numpy()
    x = torch.from_numpy((pixels[order] / 8 - 1).astype(np.float32))
    y = torch.from_numpy(labels[order].astype(np.int64))
    x_test, y_test, x_train, y_train = x[:N_TEST], y[:N_TEST], x[N_TEST:], y[N_TEST:]

    model = efficient_kan.build((64, 64, 10), grid_size=5, spline_order=3, seed=arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    for _ in tqdm(range(arguments.epochs), desc="epochs", disable=None):
        for batch in torch.randperm(len(x_train), generator=generator).split(arguments.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
        schedule.step()

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"test accuracy {accuracy:.4f} on {N_TEST} images")

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / "efficient_kan_digits.safetensors")
    calibration = {"x": x_train[:N_CALIBRATION].numpy(), "y": y_train[:N_CALIBRATION].numpy()}
    np.savez_compressed(arguments.out / "digits_calibration.npz", **calibration)
    np.savez_compressed(arguments.out / "digits_test.npz", x=x_test.numpy(), y=y_test.numpy())


if __name__ == "__main__":
    main()
