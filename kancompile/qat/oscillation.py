"""Weights that jump back and forth between two codes: what dampens them, and what ends it.

Nagel et al., *Overcoming Oscillations in Quantization-Aware Training*, ICML 2022. A straight-through slope pushes a latent weight
over the threshold between two codes and, on the other side, back. Two remedies, for methods whose codes are rounded latent
weights:

    dampening:   loss + lambda sum (code - clip(w / s, n, p))^2          the code taken as constant
    freezing:    f <- m o + (1 - m) f,   o = 1 where the code changed against its last change
                 where f > threshold, the weight stays at the rounded moving average of its codes

Distances are in steps of a weight, where the paper's are in weights: one ``lambda`` then fits all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.qat.methods import WeightQuantizer
from kancompile.qat.training_module import TrainedModel

_ROUNDED_LATENT = ("lsq", "lsq+", "dsq")


def dampening_loss(module: TrainedModel) -> Tensor:
    """Give the sum over all weights of the squared distance to their codes in steps, a scalar to add to a loss.

    Args:
        module: a prepared module; only latent weights get a gradient.

    Raises:
        KanCompileError: a method whose codes are no rounded latent weights, or widths that share them.
    """
    total = torch.zeros((), device=next(module.parameters()).device)
    for quantizer in _quantizers(module):
        position = quantizer.clipped(quantizer.latent() / quantizer.by_weight(quantizer.factor().detach()))
        total = total + (position - position.detach().round()).square().sum()
    return total


class OscillationFreezer:
    """Freezes weights whose codes jump back and forth often; call :meth:`step` after every step of the optimizer.

    What it has seen is no part of a checkpoint: a training that resumes counts anew.

    Attributes:
        threshold: frequency of jumps, per step, above which a weight is frozen.
        momentum: of the moving averages.
    """

    def __init__(self, module: TrainedModel, threshold: float = 0.02, momentum: float = 0.01) -> None:
        """Take the module and its codes as they are now.

        Raises:
            KanCompileError: as :func:`dampening_loss`; a threshold or momentum out of ]0, 1[.
        """
        if not 0 < threshold < 1 or not 0 < momentum < 1:
            raise KanCompileError(
                f"freezing: found threshold {threshold!r} and momentum {momentum!r}, expected numbers between 0 and 1"
            )
        self.threshold, self.momentum = threshold, momentum
        self._watched = [_Watched(quantizer) for quantizer in _quantizers(module)]

    @property
    def frozen(self) -> int:
        """How many weights are frozen."""
        return sum(int(one.frozen.sum()) for one in self._watched)

    @torch.no_grad()
    def step(self) -> None:
        """Look at the codes, freeze what jumped too often, and put frozen weights back in their place."""
        for one in self._watched:
            one.step(self.threshold, self.momentum)


class _Watched:
    """The codes of one layer and how often they jumped."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        self.quantizer = quantizer
        with torch.no_grad():
            self.codes = quantizer()[0]
        self.average = self.codes.clone()
        self.direction, self.frequency = torch.zeros_like(self.codes), torch.zeros_like(self.codes)
        self.frozen = torch.zeros_like(self.codes, dtype=torch.bool)
        self.stays = self.codes.clone()

    def step(self, threshold: float, momentum: float) -> None:
        codes = self.quantizer()[0]
        direction = (codes - self.codes).sign()
        jumped = (direction * self.direction < 0).float()
        self.frequency.lerp_(jumped, momentum)
        self.average.lerp_(codes, momentum)
        self.direction, self.codes = torch.where(direction != 0, direction, self.direction), codes
        found = (self.frequency > threshold) & ~self.frozen
        self.stays = torch.where(found, self.average.round(), self.stays)
        self.frozen |= found
        held = self.stays * self.quantizer.by_weight(self.quantizer.factor())
        self.quantizer.weight.copy_(torch.where(self.frozen, held, self.quantizer.weight))
        self.codes = torch.where(self.frozen, self.stays, self.codes)


def _quantizers(module: TrainedModel) -> list[WeightQuantizer]:
    method = module.training_choices.weights
    if method not in _ROUNDED_LATENT or module.shared is not None:
        what = "weights that widths share" if module.shared is not None else f"weights {method!r}"
        raise KanCompileError(
            f"oscillation: found {what}, expected a module of one width with one of {list(_ROUNDED_LATENT)!r}, whose codes are "
            "rounded latent weights"
        )
    return [one for one in module.layers.modules() if isinstance(one, WeightQuantizer)]
