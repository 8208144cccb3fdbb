"""Unmodified models from PyPI: built, trained on digits, compiled to 8 bits, validated in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kancompile
from benchmarks.client_models import CLIENTS, import_client, stand_ins
from benchmarks.digit_models import FamilyModel, build_seeded, load, train
from kancompile.progress import quiet

# the others have two; a plain linear layer in front of KAN activations is a layer as well
LAYERS = {"convkan": 3, "fkan": 3, "rkan": 3}
# networks that cannot be built, and what their users see
BROKEN = {
    "ikan GroupKAN": (AttributeError, "weight_numerator"),
    "torchkan KAN": (ModuleNotFoundError, "torchkan"),
}
# dB of the worst layer where it is less than 30: few functions stand for those of all edges
LEAST_LAYER = {"inKAN KANNetwork direct": 20.0}
# packages whose functions torch.compile writes in C++, with warnings of its own
COMPILED = ("flashkan",)
# one of each package in the default run, the others with -m slow
QUICK = ("Deep-KAN RBFKAN", "fkan", "rkan PadeRKAN", "ikan ChebyKAN", "ikan WaveletKAN", "inKAN KANNetwork")


def name_of(model: FamilyModel) -> str:
    package, _, rest = model.source.partition(" ")
    return f"{package} {rest.partition(' ')[2] if rest[:1].isdigit() else rest.removeprefix('(not installed)')}".strip()


NAMED = {name_of(model): model for model in CLIENTS}


def layers_of(name: str) -> int:
    return LAYERS.get(name.partition(" ")[0], 2)


def with_package(name: str) -> Any:
    """Give a parameter that needs the network's package, but for the one package that has no such module anywhere."""
    package = name.partition(" ")[0]
    marks = [] if package == "torchkan" else [pytest.mark.needs(package)]
    if package in COMPILED:
        marks += [pytest.mark.needs("g++"), pytest.mark.filterwarnings("ignore")]
    return pytest.param(name, marks=marks)


def compile_and_check(
    model: FamilyModel, network: nn.Module, layers: int, epochs: int, samples: int, least_layer: float = 30
) -> None:
    digits = load(model.shape)
    part = type(digits)(digits.x_train[:samples], digits.y_train[:samples], digits.x_test, digits.y_test)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    train(network, part, epochs, learning_rate=4e-3)
    assert any(not torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with quiet():
        compiled = kancompile.compile(network, part.x_train[:256])
        result = kancompile.validate(
            compiled.model_bytes,
            network,
            digits.x_test,
            digits.y_test,
            program=compiled.program,
            float_program=compiled.captured,
        )
    assert len(result.layers) == layers
    assert result.passed
    assert result.compiled.sqnr_db > 30
    assert min(layer.sqnr_db for layer in result.layers) > least_layer
    assert result.compiled.agreement is not None
    assert result.compiled.agreement >= 98
    assert result.drop is not None
    assert abs(result.drop) <= 1
    # what is simulated is what runs; float operators between the layers may differ in their last bit
    assert result.runtime is not None
    assert result.runtime.sqnr_db > 60


@pytest.mark.parametrize("name", [with_package(name) for name in QUICK])
def test_client_compiles(name: str) -> None:
    compile_and_check(NAMED[name], build_seeded(NAMED[name].build), layers_of(name), epochs=4, samples=512)


@pytest.mark.needs("convkan")
def test_convolution_compiles() -> None:
    package = import_client("convkan")

    def build() -> nn.Module:
        return nn.Sequential(package.ConvKAN(1, 6, kernel_size=3, stride=2, padding=1), nn.Flatten(), nn.Linear(96, 10))

    compile_and_check(NAMED["convkan"], build_seeded(build), 1, epochs=3, samples=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", [with_package(name) for name in NAMED if name not in (*QUICK, *BROKEN)])
def test_every_client_compiles(name: str) -> None:
    model, least = NAMED[name], LEAST_LAYER.get(name, 30)
    compile_and_check(model, build_seeded(model.build), layers_of(name), epochs=6, samples=1300, least_layer=least)


@pytest.mark.parametrize("name", [with_package(name) for name in BROKEN])
def test_broken_clients_are_still_broken(name: str) -> None:
    """The compatibility table says why these have no figures; when they can be built, they belong into the other tests."""
    error, text = BROKEN[name]
    with pytest.raises(error, match=text):
        NAMED[name].build()(torch.zeros(2, 64))


def test_importing_a_client_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rude_client.py").write_text(
        "import os\nimport absent_package.part\nos.chdir('/')\nVALUE = absent_package.part.anything\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = os.getcwd()
    module = import_client("rude_client", ("absent_package", "absent_package.part"))
    assert os.getcwd() == folder
    assert module.VALUE is not None
    with stand_ins(()):
        assert importlib.util.find_spec("absent_package") is None
