"""The networks of the board: built, trained where no weights are found, with their data."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.accuracy import MODELS, folder_with
from benchmarks.generic_quantization import static_int8
from benchmarks.latency import perceptron
from benchmarks.measured_models import MNIST_WIDTHS
from examples import train_cifar10, train_images
from kancompile.compiler.atomic_write import write_atomically
from kancompile.progress import say
from kancompile.runtimes import RuntimeModel
from kancompile.validation.float_export import export_float

CHANNELS = (3, 16, 32, 64, 64)
"""Of the networks of convolutions, which ``kagn_conv.build`` has by default."""
EPOCHS = 8
_HIDDEN = 5
_BATCH = 250
_FAMILIES = {"efficient_kan": "efficient-KAN", "fast_kan": "FastKAN", "kagn": "KAGN convolutions", "pykan": "pykan"}
_DATA = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_TABLES = {"iris": "load_iris", "wine": "load_wine", "cancer": "load_breast_cancer"}


@dataclass
class Network:
    """A trained float network.

    Attributes:
        name, seed: which.
        model: in evaluation mode.
        x, y: training samples ``[n, ...]`` and classes ``[n]``.
        test, labels: likewise, none of them among the training samples.
    """

    name: str
    seed: int
    model: nn.Module
    x: Tensor
    y: Tensor
    test: Tensor
    labels: Tensor

    def outputs(self, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute the outputs for all test samples, ``[n, classes]``."""
        with torch.no_grad():
            return torch.cat([call(part) for part in self.test.split(_BATCH)])

    @cached_property
    def float_outputs(self) -> Tensor:
        """The model's own."""
        return self.outputs(self.model)

    @cached_property
    def float_file(self) -> bytes:
        """The float ONNX export."""
        return export_float(self.model, tuple(self.x.shape[1:]))

    @cached_property
    def plain_file(self) -> bytes:
        """An int8 network of ordinary layers of the same widths, of no use but for its time."""
        samples = self.x[:256].numpy()
        if self.test.ndim == 2:
            return perceptron(widths(self.name, self.x.shape[1], int(self.y.max()) + 1), samples)
        content = export_float(_plain_convolutions(int(self.y.max()) + 1), tuple(samples.shape[1:]))
        return static_int8(content, samples, next(iter(RuntimeModel(content).input_shapes)))


def title(name: str) -> str:
    """Call a network as people do: family and data."""
    data, _, family = name.partition("_")
    if data == "pykan":
        return f"pykan, {family}"
    return f"{_FAMILIES[family]}, {_DATA[data]}"


def widths(name: str, n_in: int, n_classes: int) -> tuple[int, ...]:
    """Give the widths of a network of fully connected layers."""
    return (n_in, _HIDDEN, n_classes) if name.startswith("pykan") else MNIST_WIDTHS


def load(name: str, seed: int, data: Sequence[Path], checkpoints: Path) -> Network:
    """Load a network; without ``NAME_SEED.safetensors`` in ``checkpoints`` it is trained, which takes up to 40 minutes.

    Raises:
        SystemExit: the data are in none of the folders.
    """
    x, y, test, labels = _samples(name, data)
    model = _built(name, seed, x.shape[1], int(y.max()) + 1)
    file = checkpoints / f"{name}_{seed}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        say(f"{name}: training with seed {seed} ...")
        _train(name, model, x, y, seed)
        checkpoints.mkdir(parents=True, exist_ok=True)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        write_atomically({file: save(state)}, force=True)
    if name.startswith("pykan"):
        model = model.speed()
    return Network(name, seed, model.eval(), x, y, test, labels)


def _samples(name: str, data: Sequence[Path]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if name not in MODELS:
        return _table(name.partition("_")[2])
    trained = MODELS[name]
    found = folder_with(data, trained.data) / trained.data
    return *trained.load_split(found, "train"), *trained.load_split(found, "test")


def _table(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give a set of scikit-learn, standardized; every third sample is for the test."""
    from sklearn import datasets

    found = getattr(datasets, _TABLES[name])()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(np.asarray(found.data), dtype=torch.float32)[order]
    y = torch.tensor(np.asarray(found.target), dtype=torch.int64)[order]
    is_test = torch.arange(len(y)) % 3 == 0
    mean, spread = x[~is_test].mean(0), x[~is_test].std(0)
    x = (x - mean) / spread
    return x[~is_test], y[~is_test], x[is_test], y[is_test]


def _built(name: str, seed: int, n_in: int, n_classes: int) -> Any:
    if name in MODELS:
        return MODELS[name].build(seed=seed)
    import kan

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        width = list(widths(name, n_in, n_classes))
        return kan.KAN(width=width, grid=3, k=3, seed=seed, ckpt_path=folder, auto_save=False)


def _train(name: str, model: Any, x: Tensor, y: Tensor, seed: int) -> None:
    if name.startswith("pykan"):
        fitted = {"train_input": x, "train_label": y, "test_input": x, "test_label": y}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model.fit(fitted, steps=20, loss_fn=functional.cross_entropy, lamb=0.001)
    elif name.endswith("kagn"):
        train_cifar10.train(model, x, y, EPOCHS, seed=seed, after_epoch=say)
    else:
        train_images.train(model, x, y, EPOCHS, batch_size=64, seed=seed)


def _plain_convolutions(n_classes: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out, stride in zip(CHANNELS[:-1], CHANNELS[1:], (1, 2, 2, 1), strict=True):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], n_classes)).eval()
