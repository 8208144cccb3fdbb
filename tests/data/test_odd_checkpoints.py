"""Checkpoints of odd content: what cannot be a model's weights is refused before it reaches the model."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kancompile.data.model import load_model
from kancompile.data.state_dict import apply_state_dict, load_state_dict
from kancompile.errors.exceptions import KanCompileError
from tests.archives import declare

DEEP = "[" * 100_000


def test_archives_that_unpack_to_gigabytes_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "w.npz", weight=np.zeros(1 << 20, np.float32))
    declare(tmp_path / "w.npz", "weight.npy", 3 << 30)
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert load_state_dict(tmp_path / "w.pt")["weight"].shape == (1 << 20,)  # PyTorch reads what it does not write
    declare(tmp_path / "w.pt", "stored/data/0", 3 << 30)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    for name in ("w.npz", "w.pt"):
        assert (tmp_path / name).stat().st_size < 1 << 20
        with pytest.raises(KanCompileError, match=r"bytes that unpack to 3,\d\d\d,\d\d\d,\d\d\d, expected at most"):
            load_state_dict(tmp_path / name)


def test_what_may_be_unpacked_depends_on_the_model(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("from torch import nn\ndef make(n):\n    return nn.Linear(n, 2)\n")
    spec = f"{tmp_path / 'nets.py'}:make"
    np.savez_compressed(tmp_path / "w.npz", weight=np.zeros((2, 3_000_000)), bias=np.ones(2))
    model = load_model(spec, tmp_path / "w.npz", {"n": 3_000_000})
    assert isinstance(model, nn.Linear)
    assert torch.equal(model.bias.detach(), torch.ones(2))
    with pytest.raises(KanCompileError, match="expected at most"):
        load_model(spec, tmp_path / "w.npz", {"n": 3})


def _recursive() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["model"] = found
    return found


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)


STATE = nn.Linear(3, 2).state_dict()
CHECKPOINTS: dict[str, tuple[Callable[[], Any], str | None, str]] = {
    "holds itself": (_recursive, None, "expected a state dict"),
    "list and a key": (lambda: [torch.zeros(2)], "ema", "found no state dict under 'ema'; it has none"),
    "tensor and a key": (lambda: torch.zeros(2), "ema", "found no state dict under 'ema'; it has none"),
    "sparse": (lambda: STATE | {"weight": torch.zeros(2, 3).to_sparse()}, None, r"other kind \(1\): weight: .*sparse_coo"),
    "meta": (lambda: STATE | {"weight": torch.zeros(2, 3, device="meta")}, None, r"other kind \(1\): weight: .*meta"),
    "nested": (lambda: STATE | {"weight": _nested()}, None, r"other kind \(1\): weight: .*nested"),
    "complex": (lambda: STATE | {"weight": torch.full((2, 3), 1 + 5j)}, None, r"other kind \(1\): weight: torch.complex64"),
    "quantized": (
        lambda: STATE | {"weight": torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8)}, None, "other kind",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case: str, tmp_path: Path) -> None:
    make, key, text = CHECKPOINTS[case]
    torch.save(make(), tmp_path / "c.pt")
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(KanCompileError, match=text):
        apply_state_dict(model, load_state_dict(tmp_path / "c.pt", key))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("is_archive", [True, False])
def test_names_that_would_keep_the_reader_busy(is_archive: bool, tmp_path: Path) -> None:
    """PyTorch searches the text of its refusal with a pattern that takes time for the square of a name's length."""
    torch.save({"a" * 3_000: 1}, tmp_path / "c.pt", _use_new_zipfile_serialization=is_archive)
    started = time.process_time()
    with pytest.raises(KanCompileError, match=r"c\.pt.*a text of 3,000 characters in its pickle"):
        load_state_dict(tmp_path / "c.pt")
    assert time.process_time() - started < 1


def test_nothing_is_cut_to_an_integer() -> None:
    model = nn.BatchNorm1d(2)
    state = model.state_dict()
    apply_state_dict(model, state | {"num_batches_tracked": torch.tensor(7.0)})
    assert int(model.num_batches_tracked or 0) == 7
    for value in (7.5, float("nan")):
        with pytest.raises(KanCompileError, match=r"num_batches_tracked: values that torch.int64 cannot hold"):
            apply_state_dict(model, state | {"num_batches_tracked": torch.tensor(value)})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]\n" for last, name in pairwise("abcdefgh")
)
CONFIGS = [
    BOMB,
    "a: &a [*a]",
    "a: " + DEEP,
    "a: " + "9" * 5000,
    "a: 2001-99-99",
    "a: !!int x",
    "- 1",
    "\x00",
    "? {a: 1}\n: 2",
]


@pytest.mark.needs("pykan")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda text: text[:16])
def test_configurations_of_pykan(config: str, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="needs PyYAML: pip install 'kancompile[pykan]'")
    from kancompile.data.pykan_checkpoint import _read_config

    (tmp_path / "m_config.yml").write_text(config)
    with pytest.raises(KanCompileError, match=r"m_config.yml"):
        _read_config(tmp_path / "m_config.yml")


def _layer(grid: Tensor, coef: Tensor, **others: Tensor) -> dict[str, Tensor]:
    return {"act_fun.0.grid": grid, "act_fun.0.coef": coef, **others}


GRID, NODES = torch.zeros(2, 12), {"node_bias_0": torch.zeros(2)}
WRONG_STATES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "one dimension": (_layer(torch.zeros(3), torch.zeros(3)), {}),
    "no order": (_layer(torch.zeros(2, 3), torch.zeros(2, 1, 9)), {}),
    "one value spread out": (_layer(GRID, torch.zeros(1, 1, 1).expand(100_000, 100_000, 8)), {}),
    "sparse": (_layer(GRID.to_sparse(), torch.zeros(2, 1, 8)), {}),
    "widths": (_layer(GRID, torch.zeros(2, 3, 8), **NODES), {"width": [2, ["a"]]}),
    "more nodes than there are": (_layer(GRID, torch.zeros(2, 3, 8), **NODES), {"width": [[2, 0], [1 << 40, 0]]}),
    "fewer nodes than none": (_layer(GRID, torch.zeros(2, 3, 8), **NODES), {"width": [[2, 0], [3, -1]]}),
    "more factors than there are": (_layer(GRID, torch.zeros(2, 3, 8), **NODES), {"mult_arity": 1 << 40}),
    "order": (_layer(torch.zeros(2, 100), torch.zeros(2, 2, 8)), {}),
    "arity": (_layer(GRID, torch.zeros(2, 3, 8), **NODES), {"mult_arity": 1}),
    "base": (_layer(GRID, torch.zeros(2, 3, 8)), {"base_fun_name": ["silu"]}),
}


@pytest.mark.needs("pykan")
@pytest.mark.parametrize("case", WRONG_STATES)
def test_states_of_pykan(case: str) -> None:
    pytest.importorskip("kan", reason="needs pykan: pip install 'kancompile[pykan]'")
    from kancompile.data.pykan_checkpoint import build

    state, config = WRONG_STATES[case]
    with pytest.raises(KanCompileError, match=r"^pykan state: "):
        build(state, config)
