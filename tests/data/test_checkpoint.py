"""Models by name, weights from files: what fits loads, what does not is named, nothing is unpickled."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import kancompile
from kancompile.data.exported_file import load_exported
from kancompile.data.model import load_model, parse_factory_args
from kancompile.data.state_dict import WRAPPERS, apply_state_dict, load_state_dict
from kancompile.errors.exceptions import KanCompileError
from kancompile.recipe import read_recipe

SOURCE = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self, n_out=2, bias=True):
        super().__init__()
        self.first = nn.Linear(WIDTH, 4, bias=bias)
        self.second = nn.Linear(4, n_out, bias=bias)
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

class Holder:
    make = staticmethod(lambda: Net())

finished = Net()
number = 3
def broken():
    raise ValueError("no such size")
def text():
    return "net"
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    for name in ("nets", "neighbour", "kancompile_model_nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "nets.py"


def _state(seed: int = 0, n_out: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first.weight": (4, 3), "first.bias": (4,), "second.weight": (n_out, 4), "second.bias": (n_out,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def _write(state: dict[str, Tensor], folder: Path, form: str) -> Path:
    path = folder / f"w.{'safetensors' if form == 'safetensors' else 'npz' if form == 'npz' else 'pt'}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        wrapped: Any = {
            "plain": state,
            "state_dict": {"epoch": 3, "state_dict": state},
            "model": {"model": state, "optimizer": {"lr": 0.1}},
            "model_state_dict": {"model_state_dict": state},
            "module.": {f"module.{key}": value for key, value in state.items()},
            "compiled and parallel": {f"_orig_mod.module.{key}": value for key, value in state.items()},
            "lightning": {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 1},
        }[form]
        torch.save(wrapped, path)
    return path


@pytest.mark.parametrize("spec", ["nets:Net", "nets:Holder.make", "nets.py:Net", "nets:finished"])
def test_models_are_found_by_module_and_by_file(spec: str, source: Path) -> None:
    model = load_model(spec)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert str(source.parent) not in sys.path


@pytest.mark.parametrize(
    "form",
    [
        *("safetensors", "npz", "plain", "state_dict", "model", "model_state_dict"),
        *("module.", "compiled and parallel", "lightning"),
    ],
)
def test_every_form_of_checkpoint_gives_the_same_model(form: str, source: Path) -> None:
    state = _state()
    model = load_model("nets.py:Net", _write(state, source.parent, form))
    assert isinstance(model, nn.Module)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_half_precision_weights_are_widened(source: Path) -> None:
    save_file({key: value.half() for key, value in _state().items()}, source.parent / "w.safetensors")
    model = load_model("nets:Net", source.parent / "w.safetensors")
    assert isinstance(model, nn.Module)
    assert next(model.parameters()).dtype == torch.float32


def test_factory_arguments_are_literals_or_words() -> None:
    items = ["layers=[784, 64]", "rate=0.5", "base=silu", "flag=True", "name='a b'", "nothing=None", "negative=-1"]
    assert parse_factory_args(items) == {
        "layers": [784, 64], "rate": 0.5, "base": "silu", "flag": True, "name": "a b", "nothing": None, "negative": -1,
    }  # fmt: skip
    for item in ("layers", "=3", "a b=3", "n=[1,", "n=__import__('os')", "n=a b"):
        with pytest.raises(KanCompileError, match="factory argument"):
            parse_factory_args([item])


def test_factory_arguments_reach_the_factory(source: Path) -> None:
    model = load_model("nets:Net", factory_args={"n_out": 5})
    assert model(torch.zeros(1, 3)).shape == (1, 5)


@pytest.mark.parametrize(
    ("spec", "arguments", "text"),
    [
        ("nets", {}, "expected PACKAGE.MODULE:FACTORY"),
        ("absent.module:Net", {}, "no module 'absent.module' here"),
        ("absent.py:Net", {}, "no file 'absent.py'"),
        ("nets:Nett", {}, "'nets' has no 'Nett'; it has .*Net"),
        ("nets:number", {}, "found int, expected a class or function"),
        ("nets:text", {}, "the factory returned str"),
        ("nets:broken", {}, "the factory raised ValueError: no such size"),
        ("nets:Net", {"width": 3}, "the factory: got an unexpected keyword argument 'width'; it takes .*--factory-arg"),
        ("nets:finished", {"n_out": 3}, "factory arguments .* for a finished module"),
        ("absent.pt2", {}, "cannot be read"),
        ("absent.pt2", {"n": 1}, "a .pt2 file needs none"),
    ],
)
def test_models_that_cannot_be_built_are_refused(spec: str, arguments: dict[str, Any], text: str, source: Path) -> None:
    with pytest.raises(KanCompileError, match=text):
        load_model(spec, factory_args=arguments)


def test_import_errors_name_what_is_missing(source: Path) -> None:
    (source.parent / "needs.py").write_text("import not_there_at_all\n")
    with pytest.raises(KanCompileError, match="it imports 'not_there_at_all', which is not installed"):
        load_model("needs:Net")
    (source.parent / "wrong.py").write_text("def f(:\n")
    with pytest.raises(KanCompileError, match="importing it raised SyntaxError"):
        load_model("wrong.py:f")


def test_keys_that_do_not_match_are_all_named(source: Path) -> None:
    state = _state(n_out=7)
    del state["first.bias"]
    state["third.weight"] = torch.zeros(1)
    save_file(state, source.parent / "w.safetensors")
    with pytest.raises(KanCompileError) as caught:
        load_model("nets:Net", source.parent / "w.safetensors")
    text = str(caught.value)
    assert "missing (1): first.bias" in text
    assert "unexpected (1): third.weight" in text
    assert "second.weight: (7, 4) in the file, (2, 4) in the model" in text
    assert "--factory-arg" in text


def test_long_lists_of_keys_are_cut() -> None:
    with pytest.raises(KanCompileError, match=r"unexpected \(50\): .* and 44 more"):
        apply_state_dict(nn.Linear(2, 2), nn.Linear(2, 2).state_dict() | {f"k{i}": torch.zeros(1) for i in range(50)})


def test_a_prefix_that_the_model_itself_uses_stays() -> None:
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    apply_state_dict(model, {key: value + 1 for key, value in model.state_dict().items()})


class _Runs:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    torch.save({"state_dict": _state(), "extra": _Runs(mark)}, tmp_path / "a.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Runs(mark)))
    for name in ("a.pt", "whole.pt", "raw.pt"):
        with pytest.raises(KanCompileError, match="never loaded"):
            load_state_dict(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"hello"])
def test_damaged_checkpoints_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KanCompileError, match=r"checkpoint .*w\."):
        load_state_dict(tmp_path / name)


def test_truncated_checkpoints_are_refused(tmp_path: Path) -> None:
    for form in ("safetensors", "plain", "npz"):
        path = _write(_state(), tmp_path, form)
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(KanCompileError, match="cannot be read"):
            load_state_dict(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {}}, {"a": {"w": 1.0}}])
def test_files_without_a_state_dict_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(KanCompileError, match="expected a state dict"):
        load_state_dict(tmp_path / "w.pt")


def test_absent_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KanCompileError, match="no such file"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, source: Path) -> None:
    state = _state()
    state["second.weight"][1, 2] = value
    save_file(state, source.parent / "w.safetensors")
    with pytest.raises(KanCompileError, match=r"weights 'second.weight': found 1 NaN or infinite of 8 values"):
        load_model("nets:Net", source.parent / "w.safetensors")


def _exported(path: Path) -> Path:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).eval()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3),), dynamic_shapes=({0: batch},)), path)
    return path


def test_exported_programs_pass_through(tmp_path: Path) -> None:
    program = load_model(_exported(tmp_path / "m.pt2"), trust=True)
    assert isinstance(program, torch.export.ExportedProgram)
    assert program.module()(torch.zeros(5, 3)).shape == (5, 4)


def test_exported_files_are_not_opened_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the archive, its parts and its expressions all lead to code; so nothing at all is read."""
    path = _exported(tmp_path / "m.pt2")
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("the file was loaded"))
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("the file was read"))
    x = np.zeros((64, 3), np.float32)
    ways: list[Callable[[], object]] = [
        lambda: load_model(str(path)),
        lambda: load_exported(path),
        lambda: kancompile.capture(path, (3,)),
        lambda: kancompile.compile(path, x),
        lambda: kancompile.diagnose(path, x),
        lambda: kancompile.tune(path, x, min_sqnr=30.0),
    ]
    for way in ways:
        with pytest.raises(KanCompileError, match=r"can run any code .* --trust-model .*trust=True"):
            way()


def test_no_recipe_can_say_that_a_file_is_trusted() -> None:
    for key in ("trust", "trust_model"):
        with pytest.raises(KanCompileError, match=key):
            read_recipe({key: True})


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_damaged_archives_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(KanCompileError, match=r"m\.pt2.*cannot be loaded"):
        load_exported(tmp_path / "m.pt2", trust=True)


def _net() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number + 1.0)
    return model


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    **{name: (lambda state, name=name: {"epoch": 3, name: state}) for name in WRAPPERS},
    "beside an optimizer": lambda state: {
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "net": state,
    },
    "under an unknown name": lambda state: {"epoch": 3, "student": state},
    "twice wrapped": lambda state: {"checkpoint": {"state_dict": state}, "epoch": 3},
    "two prefixes": lambda state: {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
    "two prefixes, turned": lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "averaged": lambda state: {
        "n_averaged": torch.tensor(5),
        **{f"module.{key}": value for key, value in state.items()},
    },
}


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_are_found_inside_common_wrappers(case: str, tmp_path: Path) -> None:
    state = _net().state_dict()
    path = tmp_path / "kan.pt"
    torch.save(WRAPPED[case](state), path)
    model = _net()
    for parameter in model.parameters():
        parameter.data.zero_()
    apply_state_dict(model, load_state_dict(path), "kan.pt")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_plain_weights_come_before_averaged_ones_and_a_key_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kan.pt"
    torch.save({"ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}}, path)
    assert load_state_dict(path)["w"] == 0
    assert "takes the weights under 'model'; others are chosen with --checkpoint-key: ema" in capsys.readouterr().err
    assert load_state_dict(path, "ema")["w"] == 1
    with pytest.raises(KanCompileError, match="no state dict under 'best'; it has ema, model"):
        load_state_dict(path, "best")
    torch.save({"left": {"w": torch.ones(1)}, "right": {"w": torch.zeros(1)}}, path)
    with pytest.raises(KanCompileError, match=r"several state dicts, left, right.*--checkpoint-key"):
        load_state_dict(path)


def test_a_factory_that_needs_arguments_says_which(source: Path) -> None:
    (source.parent / "needy.py").write_text("def make(layers, grid=5, *, base='silu'):\n    raise AssertionError\n")
    with pytest.raises(KanCompileError) as caught:
        load_model(f"{source.parent / 'needy.py'}:make")
    text = str(caught.value)
    assert "missing a required argument: 'layers'; it takes (layers, grid=5, base='silu')" in text
    assert "--factory-arg NAME=VALUE" in text


def test_a_checkpoint_of_another_class_is_called_so(source: Path) -> None:
    with pytest.raises(KanCompileError, match="no name agrees: the checkpoint is of another class"):
        apply_state_dict(_net(), {"other.weight": torch.ones(2)}, "kan.pt")
