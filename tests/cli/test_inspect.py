"""What a user reads about a model that is captured in part, or not at all: the operator, the line, the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from kancompile.cli.main import main

HEAD = """\
import torch
from torch import nn


class Powers(nn.Module):
    def __init__(self, n_in=4, n_out=4):
        super().__init__()
        self.linear = nn.Linear(3 * n_in, n_out)

    def forward(self, x):
        u = torch.tanh(x)
        return self.linear(torch.cat([u, u**2, u**3], dim=1))


"""


def inspect(folder: Path, body: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, Path]:
    path = folder / "users_model.py"
    path.write_text(HEAD + body)
    found = main(["inspect", "--model", f"{path}:build", "--input-shape", "4"])
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out if code == 0 else captured.err, path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_stopping_operator_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, path = inspect(
        tmp_path,
        """\
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Powers(), Powers(2, 3)

    def forward(self, x):
        h = self.first(x)
        product = h[:, :2] * h[:, 2:]
        return self.last(product)


build = Network
""",
        capsys,
    )
    assert "2 KAN layers" in text
    line = line_of(path, "product =")
    assert f"stays as it is: mul, users_model.py:{line}: nonlinear function of several features" in text


def test_a_module_of_pytorch_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = """\
def build():
    return nn.Sequential(Powers(), nn.LayerNorm(4), Powers(), nn.LayerNorm(4), nn.Softmax(1))
"""
    text, _ = inspect(tmp_path, body, capsys)
    reason = "normalization over several features"
    assert f"stays as it is: LayerNorm, module '1' (LayerNorm): {reason}" in text
    assert "stays as it is: softmax, module '4' (Softmax): depends on several features at once" in text


def test_a_layer_used_several_times_is_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = """\
def build():
    cell = Powers()
    return nn.Sequential(cell, cell, Powers(4, 2), nn.Softmax(1))
"""
    text, _ = inspect(tmp_path, body, capsys)
    lines = text.splitlines()
    assert lines[0] == "2 KAN layers"
    assert lines[1].startswith("layer 0: 4 inputs x 3 functions")
    assert lines[1].endswith("-> 4, used 2 times")
    assert lines[2].endswith("-> 2")


def test_repeated_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, path = inspect(
        tmp_path,
        """\
class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan = Powers()

    def forward(self, x):
        return self.kan(x / x.norm(dim=1, keepdim=True))


def build():
    return nn.Sequential(Normed(), Normed())
""",
        capsys,
    )
    line = line_of(path, "x.norm")
    assert f"linalg_vector_norm, users_model.py:{line}: nonlinear reduction" in text
    assert text.count(f"users_model.py:{line}: nonlinear reduction over several features (2 times)") == 1


FAILURES = {
    "statistics of the batch": (
        "x = 2 * (x - x.min()) / (x.max() - x.min()) - 1  # here",
        "aten.min.default), where a sample's values depend on the other samples",
    ),
    "a choice by data": ("x = x if x.sum() > 0 else -x  # here", "found code that torch.export cannot trace"),
    "random numbers": ("x = x + torch.rand_like(x)  # here", "found the random operator"),
    "NaN": ("x = torch.log(-x.abs() - 1)  # here", "found NaN or infinite outputs"),
    "a number out of data": ("x = x * float(x.max())  # here", "which turns data into a Python number"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_model_that_cannot_be_captured_names_the_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statement, reason = FAILURES[case]
    text, path = inspect(
        tmp_path,
        f"""\
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.kan = Powers()

    def forward(self, x):
        {statement}
        return self.kan(x)


build = Network
""",
        capsys,
        code=2,
    )
    assert reason in text
    assert f"users_model.py:{line_of(path, '# here')}" in text
    assert "Traceback" not in text


def test_a_network_without_kan_lists_what_was_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "def build():\n    return nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3))\n"
    text, _ = inspect(tmp_path, body, capsys, code=2)
    assert "found no KAN layer" in text
    assert "softmax (module '1' (Softmax)): depends on several features at once" in text
