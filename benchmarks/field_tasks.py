"""What the networks of the field learn: digits of scikit-learn in several forms, characters of the license, an equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.digit_models import N_TEST, build_seeded, load
from benchmarks.field_layers import ChebyshevKan, GaussianKan, LocalSplineKan
from benchmarks.field_loops import KanCell, KanOde
from benchmarks.field_models import (
    Autoencoder,
    CharacterModel,
    Detector,
    DiffusionStep,
    Experts,
    GraphKan,
    HeatEquation,
    LocalSplineNet,
    ResidualKan,
    ResNetKan,
    TokenKanNet,
)
from benchmarks.field_sequences import GruKan, LstmKan
from benchmarks.field_transformers import (
    DeepChain,
    GroupedRational,
    KanGpt,
    KanTransformer,
    KanUNet,
    Mixer,
    RationalTransformer,
    RowAndColumnMixer,
)
from examples.zoo.efficient_kan import KANLinear
from examples.zoo.fast_kan import FastKANLayer
from examples.zoo.spline_conv import SplineConv2d

KAN_LAYERS = (ChebyshevKan, FastKANLayer, GaussianKan, GroupedRational, KANLinear, LocalSplineKan, SplineConv2d)
Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor]], Tensor]
_TEXT = Path(__file__).parent.parent / "LICENSE"
_WINDOW = 16
_STEPS = 50


@dataclass(frozen=True)
class Examples:
    """Inputs by name, and targets, all ``[n, ...]``; the last ``n_test`` are for testing."""

    inputs: Tensors
    targets: tuple[Tensor, ...]
    n_test: int = N_TEST

    def part(self, testing: bool) -> tuple[Tensors, tuple[Tensor, ...]]:
        """Give inputs and targets of either part."""
        rows = slice(-self.n_test, None) if testing else slice(None, -self.n_test)
        return {name: value[rows] for name, value in self.inputs.items()}, tuple(y[rows] for y in self.targets)


@dataclass(frozen=True)
class FieldModel:
    """A network of the field and its task.

    Attributes:
        name: how tables call it.
        build: factory, which may draw from the global random state.
        examples: makes the data.
        loss: of a model on a batch of inputs and targets.
        score: measures outputs against targets, by name; accuracies, IoU and R2 in percent.
        epochs, learning_rate: of the training.
    """

    name: str
    build: Callable[[], nn.Module]
    examples: Callable[[], Examples]
    loss: Loss
    score: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, float]]
    epochs: int = 15
    learning_rate: float = 4e-3


def train_model(model: FieldModel, examples: Examples, seed: int = 0) -> nn.Module:
    """Build and train a network by AdamW with a seed of its own; it comes back in evaluation mode.

    Raises:
        RuntimeError: the loss is not finite.
    """
    network = build_seeded(model.build, seed)
    inputs, targets = examples.part(False)
    count = len(targets[0])
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=model.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, model.epochs * -(-count // 64))
    network.train()
    for _ in range(model.epochs):
        for batch in torch.randperm(count, generator=generator).split(64):
            optimizer.zero_grad()
            loss = model.loss(network, [value[batch] for value in inputs.values()], [y[batch] for y in targets])
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(
                    f"{model.name}: found a loss that is not finite, expected a finite one; train slower"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            schedule.step()
    return network.eval()


def _images() -> Examples:
    digits = load((1, 8, 8))
    return Examples(
        {"image": torch.cat([digits.x_train, digits.x_test])}, (torch.cat([digits.y_train, digits.y_test]),)
    )


def _vectors() -> Examples:
    images = _images()
    return Examples({"x": images.inputs["image"].flatten(1)}, images.targets)


def _rows() -> Examples:
    """Images as sequences of their 8 rows."""
    images = _images()
    return Examples({"x": images.inputs["image"][:, 0]}, images.targets)


def _sequences() -> Examples:
    """Images as sequences of 24 steps: every second window of 18 pixels, line after line."""
    images = _vectors()
    return Examples({"x": images.inputs["x"].unfold(1, 18, 2).contiguous()}, images.targets)


def _several(examples: Examples) -> tuple[Tensor, Tensor]:
    """Give images and labels, those for training four times, which are to become different each time."""
    (x_train,), (x_test,) = (examples.part(testing)[0].values() for testing in (False, True))
    (y_train,), (y_test,) = (examples.part(testing)[1] for testing in (False, True))
    return torch.cat([x_train] * 4 + [x_test]), torch.cat([y_train] * 4 + [y_test])


def _pictures() -> Examples:
    """Images that are their own targets."""
    image = _images().inputs["image"]
    return Examples({"image": image}, (image,))


def _grainy() -> Examples:
    """Images under noise; the images are the targets."""
    image = _several(_images())[0]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return Examples({"image": image + 0.5 * noise}, (image,))


def _graphs() -> Examples:
    """The 16 patches of 2 x 2 pixels with their places, joined where they are alike or neighbors."""
    images = _images()
    patches = functional.unfold(images.inputs["image"], 2, stride=2).transpose(1, 2)
    steps = torch.arange(4.0) / 1.5 - 1
    places = torch.cartesian_prod(steps, steps)
    near = torch.exp(-(torch.cdist(places, places) ** 2))
    joined = near * torch.exp(-(torch.cdist(patches, patches) ** 2) / 8)
    nodes = torch.cat([patches, places.expand(len(patches), -1, -1)], dim=2)
    return Examples({"nodes": nodes, "adjacency": joined / joined.sum(2, keepdim=True)}, images.targets)


def _noisy() -> Examples:
    """Images under noise of a cosine schedule; the noise is the target."""
    images = _several(_vectors())[0]
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(_STEPS, (len(images),), generator=generator)
    kept = torch.cos((t + 1) / (_STEPS + 1) * torch.pi / 2)[:, None]
    noise = torch.randn(images.shape, generator=generator)
    return Examples({"x": kept * images + (1 - kept**2).sqrt() * noise, "t": t}, (noise,))


def _scenes() -> Examples:
    """Digits of 6 to 12 pixels somewhere in 16 x 16; targets are the label and the box."""
    images, labels = _several(_images())
    generator = torch.Generator().manual_seed(1)
    scenes, boxes = [], []
    for image in images:
        height, width = torch.randint(6, 13, (2,), generator=generator).tolist()
        top = int(torch.randint(17 - height, (1,), generator=generator))
        left = int(torch.randint(17 - width, (1,), generator=generator))
        scene = torch.full((1, 16, 16), -1.0)
        scene[:, top : top + height, left : left + width] = functional.interpolate(
            image[None], (height, width), mode="bilinear"
        )[0]
        scenes.append(scene)
        boxes.append(torch.tensor([left + width / 2, top + height / 2, width, height]) / 16)
    return Examples({"image": torch.stack(scenes)}, (labels, torch.stack(boxes)))


def _characters() -> list[str]:
    return sorted(set(_TEXT.read_text(encoding="utf-8")))


def _windows() -> Examples:
    """Windows of 16 characters of the license, a text that does not change; the next characters are the targets."""
    text, number = _TEXT.read_text(encoding="utf-8"), {c: n for n, c in enumerate(_characters())}
    codes = torch.tensor([number[c] for c in text])
    windows = codes.unfold(0, _WINDOW + 1, 3)
    return Examples({"token": windows[:, :-1].contiguous()}, (windows[:, 1:].contiguous(),), len(windows) // 6)


def _points() -> Examples:
    """Points of -1 ... 1 in space and 0 ... 1 in time; the target is the solution."""
    point = torch.rand(3000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    point[:, 0] = 2 * point[:, 0] - 1
    return Examples({"point": point}, (_solution(point),), 1000)


def _solution(point: Tensor) -> Tensor:
    """Solve u_t = u_xx / pi^2, u(x, 0) = sin(pi x), u(-1, t) = u(1, t) = 0."""
    return torch.exp(-point[:, 1:]) * torch.sin(torch.pi * point[:, :1])


def _classes(model: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return functional.cross_entropy(model(*x).flatten(0, -2), y[0].flatten())


def _squares(model: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return functional.mse_loss(model(*x), y[0])


def _class_and_box(model: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    logits, box = model(*x)
    return functional.cross_entropy(logits, y[0]) + 10 * functional.smooth_l1_loss(box, y[1], beta=0.1)


def _residual(model: nn.Module, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Residual of the heat equation inside, and its values at the start and at both ends; the solution is not used."""
    point = x[0].clone().requires_grad_()
    first = torch.autograd.grad(model(point).sum(), point, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), point, create_graph=True)[0][:, 0]
    start = torch.stack([x[0][:, 0], torch.zeros_like(x[0][:, 0])], dim=1)
    ends = torch.stack([torch.sign(x[0][:, 0]), x[0][:, 1]], dim=1)
    inside = ((first[:, 1] - second / torch.pi**2) ** 2).mean()
    loss: Tensor = inside + 10 * functional.mse_loss(model(start), _solution(start)) + 10 * (model(ends) ** 2).mean()
    return loss


def _accuracy(outputs: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, float]:
    return {"accuracy": 100 * float((outputs[0].argmax(-1) == y[0]).float().mean())}


def _r2(outputs: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, float]:
    left = ((outputs[0] - y[0]) ** 2).sum() / ((y[0] - y[0].mean(0)) ** 2).sum()
    return {"R2": 100 * float(1 - left)}


def _found(outputs: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, float]:
    """Accuracy of classes, and mean overlap of boxes."""
    corners = [torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1) for box in (outputs[1], y[1])]
    low, high = torch.maximum(*corners)[:, :2], torch.minimum(*corners)[:, 2:]
    both = (high - low).clamp(min=0).prod(1)
    either = outputs[1][:, 2:].prod(1) + y[1][:, 2:].prod(1) - both
    return _accuracy(outputs, y) | {"IoU": 100 * float((both / either).mean())}


def _predicted(outputs: Sequence[Tensor], y: Sequence[Tensor]) -> dict[str, float]:
    loss = functional.cross_entropy(outputs[0].flatten(0, 1), y[0].flatten())
    return _accuracy(outputs, y) | {"loss": float(loss)}


def _character_model() -> nn.Module:
    return CharacterModel(len(_characters()), _WINDOW)


def _kan_gpt() -> nn.Module:
    return KanGpt(len(_characters()), _WINDOW)


def _fast_tokens() -> nn.Module:
    """Make the block of U-KAN of layers that normalise their input themselves, beside a branch that reads it as it is."""
    generator = torch.Generator().manual_seed(0)
    return TokenKanNet(lambda n_in, n_out: FastKANLayer(n_in, n_out, generator))


FIELD: tuple[FieldModel, ...] = (
    FieldModel("graph KAN, features and adjacency", GraphKan, _graphs, _classes, _accuracy, 60),
    FieldModel("diffusion step, image and time", DiffusionStep, _noisy, _squares, _r2, 12),
    FieldModel("detection head, class and box", Detector, _scenes, _class_and_box, _found, 20),
    FieldModel("character model, attention and KAN", _character_model, _windows, _classes, _predicted, 15),
    FieldModel("autoencoder, image out", Autoencoder, _pictures, _squares, _r2, 40),
    FieldModel("U-KAN block", TokenKanNet, _images, _classes, _accuracy),
    FieldModel("U-KAN block, FastKAN layers", _fast_tokens, _images, _classes, _accuracy),
    FieldModel("mixture of KAN experts", Experts, _vectors, _classes, _accuracy),
    FieldModel("local splines, gathered", LocalSplineNet, _vectors, _classes, _accuracy),
    FieldModel("heat equation, float64", HeatEquation, _points, _residual, _r2, 40, 1e-2),
    FieldModel("residual KAN", ResidualKan, _vectors, _classes, _accuracy),
    FieldModel("ResNet, KAN head", ResNetKan, _images, _classes, _accuracy, 12),
    FieldModel("LSTM + KAN head", LstmKan, _rows, _classes, _accuracy, 40),
    FieldModel("GRU + KAN head", lambda: GruKan(len(_characters())), _windows, _classes, _predicted, 15),
    FieldModel("KAN-GPT, 4 blocks", _kan_gpt, _windows, _classes, _predicted, 12),
    FieldModel("Kolmogorov-Arnold transformer, 4 blocks", RationalTransformer, _images, _classes, _accuracy, 30, 2e-3),
    FieldModel("vision transformer with KAN blocks", KanTransformer, _images, _classes, _accuracy, 30),
    FieldModel("mixer of tokens and channels", Mixer, _images, _classes, _accuracy, 20),
    FieldModel("mixer of rows, columns and channels", RowAndColumnMixer, _images, _classes, _accuracy, 20),
    FieldModel("U-Net of KAN convolutions", KanUNet, _grainy, _squares, _r2, 6),
    FieldModel("chain of 24 layers", DeepChain, _vectors, _classes, _accuracy, 30, 2e-3),
    FieldModel("KAN cell in a loop of 24 steps", KanCell, _sequences, _classes, _accuracy, 30),
    FieldModel("ODE right-hand side, fixed-step solver of 20 calls", KanOde, _vectors, _classes, _accuracy),
)
"""Kinds of networks, in the order of the table."""


def field_model(name: str) -> FieldModel:
    """Find a network by its name."""
    found: dict[str, Any] = {model.name: model for model in FIELD}
    model: FieldModel = found[name]
    return model
