"""Which cells the board has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

AFTER = ("uniform", "gptq", "awq+gptq", "adaround", "brecq", "hawq-v2")
"""Methods after training."""
WITH = {
    "lsq": ("lsq", "lsq"),
    "lsq+": ("lsq+", "lsq+"),
    "pact": ("dorefa", "pact"),  # which says nothing of weights; its authors took DoReFa for them
    "dorefa": ("dorefa", "dorefa"),
    "qil": ("qil", "qil"),
    "dsq": ("dsq", "dsq"),
}
"""Methods with training: what they are for weights and for row indices."""
BITS_AFTER = ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4))
BITS_WITH = ((4, 4), (2, 4), (2, 2))
"""Bits of weights and of row indices: 8 are tables of 256 rows."""
PERCEPTRONS = ("mnist_efficient_kan", "mnist_fast_kan", "fashion_efficient_kan", "fashion_fast_kan")
CONVOLUTIONS = ("cifar10_kagn", "cifar100_kagn")
TABLES = ("pykan_iris", "pykan_wine", "pykan_cancer")
NETWORKS = (*PERCEPTRONS, *CONVOLUTIONS, *TABLES)
SAMPLES = 1000
OTHER_SAMPLES = (64, 256)


@dataclass(frozen=True, order=True)
class Cell:
    """One file.

    Attributes:
        network: one of :data:`NETWORKS`.
        method: of :data:`AFTER` or :data:`WITH`.
        weight_bits, index_bits: as the field writes them, ``W4A8`` say.
        seed: of the network's training, of the choice of calibration samples, and of the method.
        samples: for calibration.
    """

    network: str
    method: str
    weight_bits: int
    index_bits: int
    seed: int = 0
    samples: int = SAMPLES

    @property
    def bits(self) -> str:
        """Write the bits as the field does."""
        return bits_text(self.weight_bits, self.index_bits)

    @property
    def key(self) -> str:
        """Name the cell, as its file is called."""
        return f"{self.network}-{self.method}-{self.bits}-{self.samples}-{self.seed}"

    @property
    def with_training(self) -> bool:
        """Whether the network is trained on with its few bits."""
        return self.method in WITH


def bits_text(weight_bits: int, index_bits: int) -> str:
    """Write bits of weights and of row indices as the field does."""
    return f"W{weight_bits}A{index_bits}"


def required() -> list[Cell]:
    """List the cells of the grid that have to be filled."""
    return list(_required())


def everything() -> list[Cell]:
    """List the required cells and all others, three seeds of everything."""
    after = itertools.product(NETWORKS, AFTER, BITS_AFTER, range(3))
    trained = itertools.product((*PERCEPTRONS, *CONVOLUTIONS), WITH, BITS_WITH, range(3))
    cells = [Cell(network, method, *bits, seed) for network, method, bits, seed in (*after, *trained)]
    return list(dict.fromkeys([*required(), *cells]))


def _required() -> Iterator[Cell]:
    for network in NETWORKS:
        for seed in _seeds(network):
            for method, bits in itertools.product(AFTER, BITS_AFTER):
                if method == "brecq" and network in CONVOLUTIONS and bits != (2, 8):
                    continue  # which takes longest of all, and gains where bits are few
                yield Cell(network, method, *bits, seed)
        for samples in OTHER_SAMPLES:
            yield Cell(network, "awq+gptq", 3, 8, 0, samples)
    for network in (*PERCEPTRONS[:2], "cifar10_kagn"):
        for seed in _seeds(network):
            for method, bits in itertools.product(WITH, BITS_WITH):
                yield Cell(network, method, *bits, seed)


def _seeds(network: str) -> range:
    return range(3 if network in PERCEPTRONS else 1)
