"""What every target's ``emit`` promises (``kancompile.targets.contract.Emit``), whatever its format."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path

import pytest
import torch

from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Program
from kancompile.passes.quantize_outputs import QuantizeOutputs
from kancompile.targets import TARGETS
from kancompile.targets.contract import Emit
from tests.programs import float_program, integer_program

NAMES = [pytest.param(name, marks=[pytest.mark.needs("litert")] if name == "litert" else []) for name in TARGETS]


def parts(program: Program) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in program.graph_module.state_dict().items()}


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]  # its cache


@pytest.mark.parametrize("name", NAMES)
def test_emit_is_a_function_of_what_it_gets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target, program = TARGETS[name], integer_program((6, 5, 4), (200, 200), weight_bits=4)
    if target.quantized_outputs:
        program = QuantizeOutputs()(program, torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    text, before = str(program), parts(program)
    first, second = (target.emit(program, {"key": "value"}, storage) for storage in ("smallest", "smallest"))
    assert first == second or (name == "ort-mobile" and len(first) == len(second))
    assert b"value" in first
    assert not left_in(tmp_path)
    assert str(program) == text
    assert all(torch.equal(value, before[key]) for key, value in parts(program).items())


@pytest.mark.parametrize("name", [name for name in TARGETS if not name.startswith("ort")])
def test_what_has_no_form_is_refused_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KanCompileError, match=r"layers\.0.*expected|expected.*layers\.0|integer layers only"):
        TARGETS[name].emit(float_program(), {}, "smallest")
    assert not left_in(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_every_emit_takes_the_same(name: str) -> None:
    expected = list(inspect.signature(Emit.__call__).parameters)[1:]
    assert list(inspect.signature(TARGETS[name].emit).parameters) == expected
