"""The programs, recipes and targets of :mod:`benchmarks.replay`, compiled by whichever kancompile is importable.

Run as a script, so that only ``PYTHONPATH`` decides which tree is meant::

    PYTHONPATH=tree python benchmarks/replay_programs.py results.jsonl tree [PROGRAM ...]

It uses public names alone, which stay when files move: ``kancompile.compile``, ``kancompile.capture``, ``for_target``, ``files``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kancompile
from examples.zoo import efficient_kan, kagn_conv, spline_conv, wav_kan

SAMPLES = 96
_STEPS = 1 << 10
BY_HASH = "ort-mobile"
"""ONNX Runtime writes this target's lists in the order of a hash that changes from call to call: only its size is compared."""


def rows(*shape: int, seed: int = 1) -> Tensor:
    """Draw ``[96, *shape]`` from -1.2 ... 1.2, a little more than the usual grids."""
    return torch.rand(SAMPLES, *shape, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


def adapted_grid() -> nn.Module:
    """Give every input knots of its own."""
    model = efficient_kan.build((10, 8, 4))
    model(rows(10, seed=2) ** 3, update_grid=True)
    return model


class PlainAround(nn.Module):
    """Ordinary layers in front of, between and behind KAN layers."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.kan = efficient_kan.build((12, 8))
        for parameter in (*self.first.parameters(), *self.last.parameters()):
            nn.init.normal_(parameter, std=0.4, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 6]`` to ``[b, 3]``."""
        return self.last(torch.relu(self.norm(self.kan(self.first(x)))))  # type: ignore[no-any-return]


class TwoReaders(nn.Module):
    """Two layers read the functions of the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = (
            efficient_kan.build(widths, seed=seed) for seed, widths in enumerate(((8, 6), (6, 4), (6, 4)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 8]`` to ``[b, 4]``."""
        hidden = self.trunk(x)
        return self.left(hidden) + 0.5 * self.right(hidden)  # type: ignore[no-any-return]


def masked_pykan() -> nn.Module:
    """Build a pykan model some of whose edges are masked, and one fixed to a symbolic function."""
    import kan

    model = kan.KAN(width=[4, 5, 2], grid=4, k=3, seed=0, auto_save=False)
    for layer, i, j in ((0, 0, 1), (0, 3, 2), (1, 4, 0)):
        model.act_fun[layer].mask.data[i, j] = 0.0
    model.fix_symbolic(0, 1, 0, "sin", fit_params_bool=False, verbose=False, log_history=False)
    with torch.no_grad():  # pykan fits its splines by least squares, whose last bits change from process to process
        for weights in model.parameters():
            weights.copy_((weights * _STEPS).round() / _STEPS)
    return model  # type: ignore[no-any-return]


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "efficient-KAN": (lambda: efficient_kan.build((16, 12, 5)), (16,)),
    "adapted grid": (adapted_grid, (10,)),
    "wavelets of each edge": (lambda: wav_kan.build((10, 8, 4)), (10,)),
    "KAGN convolutions, groups": (lambda: kagn_conv.build((4, 8, 8), (1, 2), 4, groups=2), (4, 8, 8)),
    "spline convolutions": (lambda: spline_conv.build((2, 6, 6), (1, 2), 4), (2, 8, 8)),
    "plain layers around": (PlainAround, (6,)),
    "pykan, masks": (masked_pykan, (4,)),
    "two readers": (TwoReaders, (8,)),
}

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "4 bits": {"weight_bits": 4},
    "2 bits, groups": {"weight_bits": 2, "granularity": "group", "group_size": 4},
    "brecq": {"weight_bits": 3, "method": "brecq", "levels": 64},
    "int16": {"precision": "int16"},
    "float": {"precision": "float"},
    "branch": {"granularity": "branch", "method": "gptq", "weight_bits": 5},
    "percentile": {"range": "percentile", "percentile": 99.0, "levels": 256, "storage": "native"},
    "hawq-v2": {"method": "hawq-v2", "weight_bits": 4, "levels": 128, "storage": "fastest"},
    "first layer kept": {"layers": [["FIRST", {"lowering": "keep"}]], "cpu": "x86-vnni"},
}
TARGETS = ("ort-cpu", "ort-mobile", "c99", "litert", "qnn")
FOR_ALL_TARGETS = ("2 bits, groups", "percentile")
"""The others are written for ``ort-cpu`` alone: most targets refuse them, and emission takes most of the time."""


def main(results: Path, programs: Collection[str]) -> None:
    """Compile all of it; append a line of JSON for every compilation and every target."""
    x_of: dict[str, tuple[nn.Module, Tensor, str]] = {}
    with results.open("w") as file:
        for program in programs:
            make, shape = PROGRAMS[program]
            with contextlib.redirect_stdout(io.StringIO()):
                model = make().eval()
            x = rows(*shape)
            x_of[program] = (model, x, kancompile.capture(model, x[:2]).layers()[0].name)
            for name, recipe in RECIPES.items():
                start = time.process_time()
                for target, found in outcomes(*x_of[program], recipe, targets_of(name)):
                    line = {"program": program, "recipe": name, "target": target, "found": found}
                    file.write(json.dumps(line | {"seconds": time.process_time() - start}) + "\n")
                    file.flush()
                    start = time.process_time()


def targets_of(recipe: str) -> tuple[str, ...]:
    """Name the targets that a recipe is written for."""
    return TARGETS if recipe in FOR_ALL_TARGETS else TARGETS[:1]


def outcomes(
    model: nn.Module, x: Tensor, first: str, recipe: dict[str, Any], targets: tuple[str, ...]
) -> list[tuple[str, dict[str, Any]]]:
    """Give, for every target, the hash of each file, or the error."""
    if "layers" in recipe:
        recipe = recipe | {"layers": [[first, overrides] for _, overrides in recipe["layers"]]}
    try:
        compiled = kancompile.compile(model, x, recipe=recipe)
    except Exception as error:  # which error counts, too
        return [("ort-cpu", {"error": described(error)})]
    found = []
    for target in targets:
        try:
            files = compiled.for_target(target).files(Path("model.bin"))
        except Exception as error:
            found.append((target, {"error": described(error)}))
        else:
            found.append(
                (target, {path.name: fingerprint(target, path, bytes(content)) for path, content in files.items()})
            )
    return found


def described(error: Exception) -> str:
    """Name an error by class and text."""
    return f"{type(error).__name__}: {error}"


def fingerprint(target: str, path: Path, content: bytes) -> str:
    """Hash a file, or give what of it does not change from call to call."""
    if target != BY_HASH or path.suffix == ".config":
        return hashlib.sha256(content).hexdigest()
    if path.suffix == ".json":
        facts = {
            key: value for key, value in json.loads(content).items() if key not in ("model_sha256", "deflated_bytes")
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{len(content)} bytes"


if __name__ == "__main__":
    torch.set_num_threads(1)
    kancompile_at = Path(kancompile.__file__).resolve().parent.parent
    if kancompile_at != Path(sys.argv[2]).resolve():
        raise SystemExit(f"found kancompile in {kancompile_at}, expected {sys.argv[2]}")
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):  # pykan writes where it is
        main(out, sys.argv[3:] or PROGRAMS)
