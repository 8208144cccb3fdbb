"""Channels of unequal range between convolutions: equal values, more rows for narrow channels, exact in the file."""

from __future__ import annotations

import torch

from kancompile.convolutions import ConvContraction
from kancompile.modules import TableExpansion
from kancompile.passes.equalize_channels import EqualizeChannels, channel_factors
from kancompile.passes.fuse_index import FuseIndex
from kancompile.program import Program, check
from kancompile.targets.ort_cpu import emit
from tests.convolution_programs import float_convolutions, square
from tests.passes.test_convolution_passes import rounded_by, tabulate
from tests.passes.test_lowering_passes import signal_to_noise
from tests.programs import calibration_inputs
from tests.targets.test_ort_cpu import run


def uneven() -> Program:
    """Give two convolutions with channels of ranges 1, 1, 1/3, 1/3, 1/9, 1/9 between them."""
    program = float_convolutions((3, 8, 8), [square(6, 3, padding=1), square(5, 3, padding=1)])
    first = program.module("layer0_convolve")
    assert isinstance(first, ConvContraction)
    size = torch.tensor([1, 1, 1 / 3, 1 / 3, 1 / 9, 1 / 9]) * 2
    changed = ConvContraction(
        first.layer, first.weight * size.reshape(-1, 1, 1, 1), first.bias * size, first.geometry, first.out_shape
    )
    return program.replace_modules({"layer0_convolve": changed})


def test_values_stay_and_a_second_run_does_nothing() -> None:
    program = uneven()
    x = calibration_inputs(program, 64)
    equalised = EqualizeChannels()(program, x)
    check(equalised)
    torch.testing.assert_close(equalised(x), program(x), rtol=1e-4, atol=1e-5)
    assert EqualizeChannels()(equalised, x) is equalised
    traced = equalised.trace(x, ["layer0_convolve"])["layer0_convolve"][1]
    reach = traced.transpose(0, 1).flatten(1).abs().amax(1)
    assert float(reach.min()) > 0.4 * float(reach.max())


def test_integer_error_falls_and_the_file_is_exact() -> None:
    program = uneven()
    x, fresh = calibration_inputs(program, 64), calibration_inputs(program, 32, seed=9)
    quality = []
    for start in (program, EqualizeChannels()(program, x)):
        lowered = FuseIndex()(rounded_by(tabulate(start)))
        quality.append(signal_to_noise(program(fresh), lowered(fresh)))
    assert quality[1] > quality[0] + 0.3
    table = lowered.module("layer1_expand0")
    assert isinstance(table, TableExpansion)
    assert 1 < table.n_tables <= 6
    assert table.input == "index"
    assert torch.equal(torch.from_numpy(run(emit(lowered, {}), fresh)), lowered(fresh))


def test_factors() -> None:
    y = torch.zeros(2, 4, 1, 50)
    y[0, :, 0, 0] = torch.tensor([8.0, 4.1, 3.9, 0.0])
    y[1, :, 0, 3] = torch.tensor([-4.0, -0.1, -4.0, -0.01])
    torch.testing.assert_close(channel_factors(y), torch.tensor([1.0, 2**-0.5, 1.0, 2**-2.5]))
