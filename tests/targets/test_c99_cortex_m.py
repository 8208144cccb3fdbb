"""The digits model as firmware of emulated Cortex-M cores, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kancompile
from examples.c99 import cortex_m
from examples.zoo import efficient_kan
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.runtimes.session import RuntimeModel
from tests.convolution_programs import integer_convolutions, square
from tests.targets.test_ort_cpu import inputs

pytestmark = pytest.mark.needs("cortex-m")

DIGITS = Path(__file__).parent.parent.parent / "examples" / "digits"


@pytest.fixture(scope="module")
def digits() -> CompiledModel:
    model = efficient_kan.build((64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    recipe = {"weight_bits": 4, "method": "uniform"}
    return kancompile.compile(model.eval(), DIGITS / "digits_calibration.npz", target="c99", recipe=recipe)


@pytest.mark.parametrize("core", cortex_m.CORES, ids=lambda core: core.name)
def test_digits_on_every_core_equal_onnx_runtime(core: cortex_m.Core, digits: CompiledModel) -> None:
    x = torch.from_numpy(np.load(DIGITS / "digits_test.npz", allow_pickle=False)["x"][:20]).float()
    x[:4] = torch.linspace(-30, 30, 4)[:, None]
    done = cortex_m.run(core, digits.model_bytes, digits.companions[".h"], x.numpy())
    np.testing.assert_array_equal(done.outputs, RuntimeModel(digits.session_bytes)(x).numpy())
    assert done.state == digits.manifest["ram_bytes"]
    # constants are what the manifest states; the code of the model comes to it
    assert digits.manifest["stored_bytes"] < done.flash < digits.manifest["stored_bytes"] + 6000
    assert done.stack < 1024
    # at least one instruction for each product that a 32-bit multiplication does two of, and not many more
    assert digits.manifest["products"] / 2 < done.instructions < 8 * digits.manifest["products"]


def test_convolutions_on_the_smallest_core() -> None:
    program = integer_convolutions((2, 6, 6), [square(4, 3, padding=1), square(3, 3)], zero_point=5)
    from kancompile.targets.c99 import companions, emit

    source, x = emit(program, {}), inputs(program, 10)
    done = cortex_m.run(cortex_m.CORES[0], source, companions(source)[".h"], x.numpy())
    np.testing.assert_array_equal(done.outputs, program(x).flatten(1).numpy())
