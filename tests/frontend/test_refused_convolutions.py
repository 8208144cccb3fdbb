"""What capture says of convolutions that it does not take, and what it makes of the layers beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend import capture
from tests.frontend.capturing import captured
from tests.frontend.convolution_models import PowersConv, Wrapped, powers


def _refusals() -> list[tuple[Callable[..., Tensor], dict[str, nn.Module], str]]:
    return [
        (lambda x, conv: conv(powers(x, 3)), {"conv": nn.ConvTranspose2d(12, 4, 3)}, "transposed convolution"),
        (
            lambda x, conv: conv(powers(x, 3)),
            {"conv": nn.Conv2d(12, 4, 3, padding=1, padding_mode="reflect")},
            "pixels",
        ),
        (lambda x, conv: conv(powers(functional.pad(x, (1, 1, 1, 1)), 3)), {"conv": nn.Conv2d(12, 4, 3)}, "pixels"),
        (lambda x, conv: conv(powers(x, 3).flip(2)), {"conv": nn.Conv2d(12, 4, 3)}, "move between pixels"),
        (lambda x, conv: conv(powers(x, 3).transpose(2, 3)), {"conv": nn.Conv2d(12, 4, 3)}, "move between pixels"),
        (
            lambda x, conv: conv(x * torch.sin(x * torch.arange(1.0, 31).reshape(6, 5))),
            {"conv": nn.Conv2d(4, 4, 3)},
            "functions differ between pixels",
        ),
        (
            lambda x, conv: conv(functional.relu(x)),
            {"conv": nn.Conv2d(4, 4, 3)},
            "convolution after a plain activation",
        ),
        (lambda x, conv: conv(x), {"conv": nn.Conv2d(4, 4, 3)}, "plain linear layer"),
        (
            lambda x, conv: conv(powers(x, 3)) * torch.arange(1.0, 31).reshape(6, 5),
            {"conv": nn.Conv2d(12, 4, 3, padding=1)},
            "weights behind the convolution differ between pixels",
        ),
    ]


@pytest.mark.parametrize(("function", "modules", "reason"), _refusals())
def test_refusals(function: Callable[..., Tensor], modules: dict[str, nn.Module], reason: str) -> None:
    with pytest.raises(KanCompileError, match=rf"convolution_models.py:\d+\): .*{reason}"):
        capture(Wrapped(function, **modules), (4, 6, 5))


def test_refused_convolution_stays_beside_captured_ones() -> None:
    model = Wrapped(
        lambda x, first, second: second(powers(first(x), 3)),
        first=PowersConv(4, 4, padding=1),
        second=nn.ConvTranspose2d(12, 3, 2, stride=2),
    )
    program = captured(model, (4, 6, 5))
    assert [layer.name for layer in program.layers()] == ["first"]
    (entry,) = program.unrecognized
    assert entry.reason == "transposed convolution"
    assert entry.source.startswith("convolution_models.py:")
