"""Normalization in front of the first layer, in the targets that have no float operators or few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.errors import KanCompileError
from kancompile.runtimes.litert import RUNTIME
from tests.targets.c_programs import STRICT, UNDEFINED, build, evaluate, write

N_IN = 4
MEAN, SPREAD = torch.tensor([3.0, -200.0, 0.01, 5.0]), torch.tensor([2.0, 50.0, 0.005, 0.0])


def samples(n: int = 300, *shape: int) -> Tensor:
    drawn = torch.randn(n, *shape, N_IN, generator=torch.Generator().manual_seed(2))
    return drawn * SPREAD + MEAN


class Normalized(nn.Module):
    """A KAN layer behind a function of every input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = KAN([N_IN, 3], torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.function(x))  # type: ignore[no-any-return]


def batch_norm(channels: int = N_IN, **options: bool) -> nn.Module:
    norm = nn.BatchNorm1d(channels, **options)
    x = samples(500) if channels == N_IN else samples(500, channels)
    norm(x if channels == N_IN else x / SPREAD.clamp(min=1))
    for _ in range(30):
        norm(x)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
            norm.bias.copy_(torch.linspace(-0.5, 0.5, channels))
    return norm.eval()


LOW, HIGH = MEAN - 3, MEAN + 3
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (lambda: Normalized(batch_norm()), ()),
    "batch norm without factors": (lambda: Normalized(batch_norm(affine=False)), ()),
    "batch norm of tokens": (lambda: nn.Sequential(Normalized(batch_norm(5)), nn.Flatten()), (5,)),
    "standardization": (lambda: Normalized(lambda x: (x - MEAN) / (SPREAD + 1e-3)), ()),
    "clipped standardization": (lambda: Normalized(lambda x: torch.clamp((x - MEAN) / (SPREAD + 1e-3), -2, 2)), ()),
    "minimum and maximum": (lambda: Normalized(lambda x: 2 * (x - LOW) / (HIGH - LOW) - 1), ()),
    "from above, in another order": (
        lambda: Normalized(lambda x: ((MEAN - x).relu() / 60).flip(-1)[:, [2, 0, 1, 3]]),
        (),
    ),
}


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("case", CASES)
def test_c99_normalizes_before_the_first_table(case: str, tmp_path: Path) -> None:
    make, shape = CASES[case]
    x = samples(300, *shape)
    compiled = kancompile.compile(make(), x, target="c99")
    assert compiled.validate(x).passed
    expected = compiled.program(x).numpy()
    found = evaluate(build(write(compiled.program, tmp_path), [*STRICT, "-O2", *UNDEFINED]), x)
    # the sum of a normalization may be rounded twice or once, which decides ties
    assert (found != expected).mean() < 0.002
    assert np.abs(found - expected).max() < 0.05 * np.ptp(expected)


@pytest.mark.needs("litert")
@pytest.mark.parametrize("case", ["batch norm", "batch norm of tokens", "standardization", "minimum and maximum"])
def test_litert_normalizes_before_the_first_table(case: str, tmp_path: Path) -> None:
    make, shape = CASES[case]
    x = samples(300, *shape)
    compiled = kancompile.compile(make(), x, target="litert")
    (tmp_path / "model.tflite").write_bytes(compiled.model_bytes)
    found, expected = RUNTIME.run(tmp_path / "model.tflite", x.numpy()), compiled.program(x).numpy()
    assert (found != expected).mean() < 0.002


def test_functions_without_exact_arithmetic_are_still_refused() -> None:
    with pytest.raises(
        KanCompileError, match=r"target 'c99': layer .* sub computes in float .*expected integer tables"
    ):
        kancompile.compile(Normalized(lambda x: torch.tanh(x - x[:, :1])), samples(), target="c99")
