"""Names of modules that Python code, C comments and texts in quotes cannot hold as they are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.errors import KanCompileError
from kancompile.frontend import capture
from kancompile.recipe import read_recipe


class Named(nn.Module):
    """Layers that the user calls anything."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        widths = [3] * (len(names) + 1)
        for name, layer in zip(names, KAN(widths, torch.Generator().manual_seed(0)).layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self._modules.values():
            assert layer is not None
            x = layer(x)
        return x


NAMES = ("class", 'it\'s "one"', "a\nb", "*/ #include <x> \\")
X = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)


@pytest.mark.needs("gcc")
@pytest.mark.slow
def test_files_of_models_with_odd_names(tmp_path: Path) -> None:
    model = Named(*NAMES)
    compiled = kancompile.compile(model, X, recipe={"goal_sqnr": None, "layers": {NAMES[1]: {"weight_bits": 4}}})
    assert [layer.name for layer in compiled.program.layers()] == list(NAMES)
    assert [layer["weight_bits"] for layer in compiled.manifest["layers"]] == [8, 4, 8, 8]
    onnx.checker.check_model(onnx.load_model_from_string(compiled.model_bytes))
    assert compiled.validate(X).passed
    (tmp_path / "r.toml").write_text(compiled.recipe.to_toml(), encoding="utf-8")
    assert read_recipe(tmp_path / "r.toml").layers == compiled.recipe.layers
    source = compiled.for_target("c99").save(tmp_path / "model.c")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    subprocess.run(["gcc", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", str(source)], check=True)


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"called '\\ud800.*expected names that UTF-8 can hold"):
        capture(Named("\ud800"), (3,))


def test_exports_with_such_names_are_refused_as_pytorch_itself_cannot_run_them() -> None:
    exported = torch.export.export(Named("class"), (torch.zeros(2, 3),), dynamic_shapes=({0: torch.export.Dim("b")},))
    with pytest.raises(KanCompileError, match="expected names that Python code can hold; compile the module"):
        capture(exported, (3,))


class Outputs(nn.Module):
    """A dict of two outputs, of a dict of two inputs where that is given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.layers = KAN([3, 3, 2], torch.Generator().manual_seed(0)).layers

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.layers[0](x)
        return dict(zip(self.names, (hidden, self.layers[1](hidden)), strict=True))


class Inputs(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = KAN([3, 2], torch.Generator().manual_seed(0)).layers[0]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[self.name] + batch["other"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_names_of_outputs_that_no_file_can_hold(name: str) -> None:
    with pytest.raises(KanCompileError, match=r"found an output called .*; return it under another name"):
        kancompile.compile(Outputs(name, "b"), X)


@pytest.mark.parametrize("name", ["it's", "a\nb", "\ud800", 'a"', "\\"])
def test_names_of_inputs_that_code_cannot_hold(name: str) -> None:
    with pytest.raises(KanCompileError, match=r"calibration: found an input called .*; give it another name"):
        kancompile.compile(Inputs(name), {name: X, "other": X})
