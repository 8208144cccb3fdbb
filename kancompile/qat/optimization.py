"""Parts of a training loop that are the same in every loop: parameter groups, distillation, and keeping the best state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kancompile.errors import KanCompileError
from kancompile.qat.elastic import ElasticModel
from kancompile.qat.training_module import TrainedModel

SCALE_SHARE = 0.1
"""Learning rate of scales and ranges as a part of that of weights: all weights of an output hang on one scale."""


def parameter_groups(module: TrainedModel | ElasticModel, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Divide the parameters for an optimizer of ``torch.optim``.

    Weights are in steps of their scale, biases in eighths of their output's deviation, table entries in sixteenths of their
    codes, scales and ranges in parts of what they were, so that one rate serves all of them and all layers.

    Args:
        module: a prepared module.
        lr: learning rate of weights, biases and tables; scales and ranges get a tenth of it.
        weight_decay: of weights; scales, ranges, biases and tables get none, since 0 is nothing that they should tend to.
    """
    weights = [value for name, value in module.named_parameters() if name.endswith(("quantizer.weight", ".move"))]
    known = set(map(id, weights))
    offsets = [value for name, value in module.named_parameters() if name.endswith((".bias", ".change"))]
    known |= set(map(id, offsets))
    scales = [value for value in module.parameters() if value.requires_grad and id(value) not in known]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": offsets, "lr": lr, "weight_decay": 0.0},
        {"params": scales, "lr": lr * SCALE_SHARE, "weight_decay": 0.0},
    ]


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Give the cross-entropy between the classes of two models.

    Hinton et al., *Distilling the Knowledge in a Neural Network* (2015):
    ``-T^2 sum softmax(teacher / T) log softmax(student / T)``, the mean over samples; its gradient is that of the divergence.

    Args:
        logits: of the model that learns, ``[n, classes]``.
        teacher_logits: of the float model, ``[n, classes]``; no gradient flows into them.
        temperature: above 1 unlikely classes count more.

    Raises:
        KanCompileError: shapes differ.
    """
    if logits.shape != teacher_logits.shape or logits.dim() != 2:
        raise KanCompileError(
            f"distillation: found logits {tuple(logits.shape)!r} and {tuple(teacher_logits.shape)!r}, expected [n, classes] "
            "of both"
        )
    target = functional.softmax(teacher_logits.detach() / temperature, dim=1)
    return functional.cross_entropy(logits / temperature, target) * temperature**2


class BestState:
    """Keeps the state of least held-out loss, beginning with the post-training one, so that training never ends below it."""

    def __init__(self, module: nn.Module, loss: float) -> None:
        """Take the module before training and its loss on samples that it is not trained on."""
        self.module, self.loss = module, loss
        self._state = _copied(module)

    def offer(self, loss: float) -> bool:
        """Keep the state as it is now, where its loss is less; NaN never is."""
        if not loss < self.loss:
            return False
        self.loss, self._state = loss, _copied(self.module)
        return True

    def restore(self) -> None:
        """Load the best state into the module."""
        self.module.load_state_dict(self._state)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def held_out_loss(module: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
    """Measure the mean cross-entropy in evaluation mode; the mode is left as it was.

    Args:
        module: any classifier; of an elastic one all widths are measured, and the mean is given.
        x: samples ``[n, ...]``.
        y: classes, int64 ``[n]``.
        batch_size: samples of a batch.
    """
    if isinstance(module, ElasticModel):
        losses = [held_out_loss(one, x, y, batch_size) for one in module.modules_by_bits().values()]
        return sum(losses) / len(losses)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        total = sum(
            functional.cross_entropy(module(part), classes, reduction="sum").item()
            for part, classes in zip(x.split(batch_size), y.split(batch_size), strict=True)
        )
    module.train(was_training)
    return total / len(x)
