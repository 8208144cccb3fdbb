"""Wav-KAN: every edge is a wavelet with a scale and a translation of its own.

Bozorgasl and Chen, *Wav-KAN: Wavelet Kolmogorov-Arnold Networks* (arXiv 2405.12832)::

    y[b, o] = batch_norm(sum_i wavelet_weights[o, i] * psi((x[b, i] - translation[o, i]) / scale[o, i]))

State dict per layer ``layers.N.``: ``scale``, ``translation``, ``wavelet_weights`` and ``weight1`` (which the published code
holds and never uses), all [out, in], and ``bn`` (BatchNorm1d).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from examples.zoo.layer_chain import LayerChain


def mexican_hat(t: Tensor) -> Tensor:
    """Second derivative of a Gaussian, of unit energy, with the sign of the published code."""
    return 2 / (math.sqrt(3) * math.pi**0.25) * (t * t - 1) * torch.exp(-0.5 * t * t)


def morlet(t: Tensor) -> Tensor:
    """Real Morlet wavelet of central frequency 5."""
    return torch.cos(5.0 * t) * torch.exp(-0.5 * t * t)


def derivative_of_gaussian(t: Tensor) -> Tensor:
    """First derivative of a Gaussian."""
    return -t * torch.exp(-0.5 * t * t)


WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {
    "mexican_hat": mexican_hat,
    "morlet": morlet,
    "dog": derivative_of_gaussian,
}


class WavKANLayer(nn.Module):
    """Map [b, in_features] to [b, out_features] by one wavelet for each edge."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        wavelet_type: str,
        generator: torch.Generator,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if wavelet_type not in WAVELETS:
            raise ValueError(f"WavKANLayer: found wavelet {wavelet_type!r}, expected one of {sorted(WAVELETS)!r}")
        self.wavelet = WAVELETS[wavelet_type]
        self.scale = nn.Parameter(torch.full((out_features, in_features), initial_scale))
        self.translation = nn.Parameter(torch.zeros(out_features, in_features))
        self.wavelet_weights = nn.Parameter(torch.empty(out_features, in_features))
        self.weight1 = nn.Parameter(torch.zeros(out_features, in_features))
        nn.init.kaiming_uniform_(self.wavelet_weights, a=math.sqrt(5), generator=generator)
        self.bn = nn.BatchNorm1d(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [b, in_features]."""
        wavelets = self.wavelet((x.unsqueeze(1) - self.translation) / self.scale)
        return self.bn((wavelets * self.wavelet_weights).sum(2))


def build(
    widths: Sequence[int] = (64, 32, 10),
    wavelet_type: str = "mexican_hat",
    initial_scale: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Build a Wav-KAN of the given widths (input first) with weights drawn from ``seed``.

    Morlet wavelets of scale 1 turn five times over the inputs they see and hardly train; wider ones do.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = itertools.pairwise(widths)
    return LayerChain([WavKANLayer(n_in, n_out, wavelet_type, generator, initial_scale) for n_in, n_out in pairs])
