"""A training loop for those who have none: Adam with a cosine schedule, half on labels and half on the float model's outputs.

The best state on held-out samples is kept, the start included, so that training never ends below compiling. Order and rate of a
step are functions of the seed and the step alone: a training that was interrupted goes on to the very bits of one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kancompile.errors import KanCompileError, shown
from kancompile.ir import NamedTensors, Values, concatenated
from kancompile.progress import say, track
from kancompile.qat.checkpoint import load_checkpoint, save_checkpoint
from kancompile.qat.elastic import ElasticModel
from kancompile.qat.optimization import BestState, distillation_loss, parameter_groups
from kancompile.qat.training_module import TrainedModel

_TEMPERATURE = 2.0
_EVALUATED = 1024


@dataclass(frozen=True)
class Schedule:
    """How long a training takes and how fast it goes.

    Attributes:
        epochs: passes over the samples.
        batch_size: samples of a step.
        rate: learning rate of the first step; it falls to 0 by half a cosine.
        seed: of the order of the samples.

    Raises:
        KanCompileError: a count below 1, or a rate that is not positive.
    """

    epochs: int = 3
    batch_size: int = 128
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.rate < math.inf:
            raise KanCompileError(
                f"training: found {self.epochs!r} epochs, batches of {self.batch_size!r} and the rate {self.rate!r}, expected at "
                "least 1, at least 1, and a positive number"
            )

    def name(self) -> str:
        """Name the choices in a few letters, for files of states that only go on under the same ones."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Labelled:
    """Samples with their labels.

    Attributes:
        x: ``[n, ...]``, or several inputs by name.
        y: classes, int64 ``[n]``, or values, float32, as many a sample as the model has outputs.
    """

    x: Values
    y: Tensor

    def batch(self, rows: Tensor | slice, device: torch.device) -> tuple[Values, Tensor]:
        """Take rows, on a device."""
        x = self.x[rows]
        if isinstance(x, NamedTensors):
            return NamedTensors({name: value.to(device) for name, value in x.tensors.items()}), self.y[rows].to(device)
        return x.to(device), self.y[rows].to(device)


def fit(
    module: TrainedModel | ElasticModel,
    samples: Labelled,
    held_out: Labelled,
    schedule: Schedule,
    teacher: Callable[[Values], Any],
    states: Path | None = None,
    resume: bool = False,
) -> list[float]:
    """Train a module in place, and leave it in the best state.

    Args:
        module: a prepared module, as fresh as it was prepared.
        samples: to train on.
        held_out: to choose the best state with.
        schedule: see there.
        teacher: the float model.
        states: folder for the state after every epoch, ``None`` for no states.
        resume: go on with the state in the folder.

    Returns:
        losses on the held-out samples, before the first epoch and after each; of those that were run in this call.

    Raises:
        KanCompileError: labels that do not fit the outputs, training diverged, or no state to go on with.
    """
    device = next(module.parameters()).device
    with torch.no_grad():
        parts = [teacher(samples.x[start : start + _EVALUATED]) for start in range(0, len(samples.y), _EVALUATED)]
    if not all(isinstance(part, Tensor) for part in parts):
        raise KanCompileError(
            "training: found a model of several outputs, expected one; train with kancompile.qat.prepare in a loop of your own"
        )
    taught = concatenated(parts)
    assert isinstance(taught, Tensor)
    for labelled in (samples, held_out):
        _check_labels(labelled.y, taught)
    optimizer = torch.optim.Adam(parameter_groups(module, schedule.rate))
    starts = [group["lr"] for group in optimizer.param_groups]
    best = BestState(module, _loss_on(module, held_out))
    losses = [best.loss]
    steps = -(-len(samples.y) // schedule.batch_size)
    first = 0
    if resume:
        assert states
        first = _resume(module, optimizer, best, held_out, schedule, states) // steps
        say(f"training goes on after epoch {first} of {schedule.epochs}")
    else:
        say(f"before training: held-out loss {best.loss:.4f}")
    for epoch in range(first, schedule.epochs):
        module.train()
        generator = torch.Generator().manual_seed(schedule.seed + 1000003 * epoch)
        order = torch.randperm(len(samples.y), generator=generator).split(schedule.batch_size)
        for number, rows in enumerate(track(order, f"epoch {epoch + 1}/{schedule.epochs}")):
            share = (epoch * steps + number) / (schedule.epochs * steps)
            for group, start in zip(optimizer.param_groups, starts, strict=True):
                group["lr"] = start * 0.5 * (1 + math.cos(math.pi * share))
            x, y = samples.batch(rows, device)
            optimizer.zero_grad()
            outputs = module(x)
            loss = (_by_label(outputs, y) + _by_teacher(outputs, taught[rows].to(device), y)) / 2
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        module.check_finite()
        losses.append(_loss_on(module, held_out))
        better = best.offer(losses[-1])
        say(f"epoch {epoch + 1}/{schedule.epochs}: held-out loss {losses[-1]:.4f}{', the best' if better else ''}")
        if states is not None:
            if better:
                save_checkpoint(module, _best_of(states, schedule))
            save_checkpoint(module, _last_of(states, schedule), optimizer)
    best.restore()
    module.eval()
    return losses


def state_files(folder: Path, schedule: Schedule) -> tuple[Path, Path]:
    """Name the files in which :func:`fit` keeps the last and the best state."""
    return _last_of(folder, schedule), _best_of(folder, schedule)


def _last_of(folder: Path, schedule: Schedule) -> Path:
    return folder / f"training-{schedule.name()}.safetensors"


def _best_of(folder: Path, schedule: Schedule) -> Path:
    return folder / f"training-{schedule.name()}-best.safetensors"


def _resume(
    module: TrainedModel | ElasticModel,
    optimizer: torch.optim.Optimizer,
    best: BestState,
    held_out: Labelled,
    schedule: Schedule,
    folder: Path,
) -> int:
    """Load the states of a training, and return how many steps it took."""
    last, best_file = state_files(folder, schedule)
    if not last.is_file():
        raise KanCompileError(
            f"training: found no state {str(last)!r}, expected that of a training with the same epochs, batches, rate and seed "
            f"({shown(asdict(schedule))}), to go on with; leave --resume out to begin anew"
        )
    if best_file.is_file():
        load_checkpoint(module, best_file)
        best.offer(_loss_on(module, held_out))
    load_checkpoint(module, last, optimizer)
    return int(module.steps)


def _check_labels(labels: Tensor, outputs: Tensor) -> None:
    """Refuse labels that no loss compares with such outputs."""
    if labels.is_floating_point():
        if labels.numel() * len(outputs) != outputs.numel() * len(labels):
            raise KanCompileError(
                f"training: found labels of shape {tuple(labels.shape)!r} and outputs of shape {tuple(outputs.shape)!r}, "
                "expected as many values a sample as the model has outputs"
            )
        return
    if labels.dim() != 1 or outputs.dim() != 2:
        raise KanCompileError(
            f"training: found labels of shape {tuple(labels.shape)!r} and outputs of shape {tuple(outputs.shape)!r}, expected a "
            "class a sample and [n, classes]; train with kancompile.qat.prepare in a loop of your own"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        raise KanCompileError(
            f"training: found classes {low} ... {high}, expected 0 ... {outputs.shape[1] - 1} as the model has "
            f"{outputs.shape[1]} outputs; labels that are values are floats"
        )


def _by_label(outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    if y.is_floating_point():
        return functional.mse_loss(outputs, y.reshape(outputs.shape), reduction=reduction)
    return functional.cross_entropy(outputs, y, reduction=reduction)


def _by_teacher(outputs: Tensor, taught: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():
        return functional.mse_loss(outputs, taught)
    return distillation_loss(outputs, taught, temperature=_TEMPERATURE)


@torch.no_grad()
def _loss_on(module: TrainedModel | ElasticModel, held_out: Labelled) -> float:
    """Measure the mean loss by labels, of an elastic module the mean over its widths."""
    if isinstance(module, ElasticModel):
        losses = [_loss_on(one, held_out) for one in module.modules_by_bits().values()]
        return sum(losses) / len(losses)
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    total = count = 0.0
    for start in range(0, len(held_out.y), _EVALUATED):
        x, y = held_out.batch(slice(start, start + _EVALUATED), device)
        total += float(_by_label(module(x), y, reduction="sum"))
        count += y.numel()
    module.train(was_training)
    return total / count
