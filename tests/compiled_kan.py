"""A small trained-looking KAN, compiled once for all tests that need a real file."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from examples.zoo.efficient_kan import KAN
from kancompile.compiler.compile import compile
from kancompile.compiler.compiled_model import CompiledModel

N_IN, N_HIDDEN, N_OUT = 6, 5, 3
FACTORY = "examples.zoo.efficient_kan:KAN"
FACTORY_ARGS = f"layers_hidden=[{N_IN},{N_HIDDEN},{N_OUT}]"


def make_model() -> nn.Module:
    """Build the same model every time."""
    return KAN([N_IN, N_HIDDEN, N_OUT], torch.Generator().manual_seed(5)).eval()


def make_inputs(n: int = 120, seed: int = 0) -> Tensor:
    """Draw inputs inside and a little outside the grid."""
    return torch.rand(n, N_IN, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


@lru_cache
def compiled_kan(levels: int | None = None) -> CompiledModel:
    """Compile it; ``levels`` up to 256 hands row numbers from layer to layer, more hands over scaled values."""
    return compile(make_model(), make_inputs(), recipe={"levels": levels})
