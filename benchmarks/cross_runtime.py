"""Count the outputs that differ between processors, versions of ONNX Runtime and file formats.

Run from the root of the repository::

    python -m kancompile.runtimes.emulation
    python -m benchmarks.cross_runtime --data FOLDER --checkpoints FOLDER

Without the folders, the MLP is that of ``examples/digits`` and the convolutions have seeded weights. The convolutions end at the
last one, since the average and the linear layer behind it stay in float, which every processor adds up in its own order.
Inputs are those of the test set, a quarter of them moved to exact ties between two rows of the first table, a quarter
stretched beyond the calibrated range. Versions of ONNX Runtime are installed by pip to folders of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from benchmarks.accuracy import MODELS
from benchmarks.results_file import write_results
from examples.zoo import efficient_kan, kagn_conv
from examples.zoo.gram_kan import gram_polynomials
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import TableExpansion
from kancompile.progress import quiet
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.contract import Prepared, Runtime, available
from kancompile.runtimes.emulation import cache_folder, run_session
from kancompile.validation.runtime_comparison import RuntimeComparison, compare_runtimes

VERSIONS = ("1.20.1", "1.22.1", "1.24.4")
_DIGITS = Path("examples/digits")
_CROP = 4


@dataclass(frozen=True)
class Subject:
    """A float model with data: ``calibration`` and ``test`` ``[n, ...]``."""

    name: str
    model: nn.Module
    calibration: Tensor
    test: Tensor


class Convolutions(nn.Module):
    """The convolutional layers of a classifier, without the last activation and what follows it."""

    def __init__(self, classifier: kagn_conv.KAGNClassifier) -> None:
        super().__init__()
        self.layers = classifier.layers

    def forward(self, x: Tensor) -> Tensor:
        """Give the values in front of the last activation, ``[batch, channels, height, width]``."""
        *front, last = self.layers
        assert isinstance(last, kagn_conv.KAGNConv2d)
        for layer in front:
            x = layer(x)
        basis = torch.cat(gram_polynomials(torch.tanh(x), last.beta_weights, last.degree), dim=1)
        y = functional.conv2d(functional.silu(basis), last.poly_weights[0], stride=last.stride, padding=last.padding)
        normalised: Tensor = last.layer_norm[0](last.base_conv[0](functional.silu(x)) + y)
        return normalised


def mlp(data: Path | None, checkpoints: Path | None) -> Subject:
    """Load the MNIST model, or the one of the repository."""
    if data is None or checkpoints is None:
        model = efficient_kan.build((64, 64, 10))
        model.load_state_dict(load_file(_DIGITS / "efficient_kan_digits.safetensors"))
        calibration, test = (
            torch.from_numpy(np.load(_DIGITS / f"digits_{part}.npz")["x"]) for part in ("calibration", "test")
        )
        return Subject("digits efficient-KAN 64-64-10", model.eval(), calibration, test)
    trained = MODELS["mnist_efficient_kan"]
    model = trained.build()
    model.load_state_dict(load_file(checkpoints / "mnist_efficient_kan.safetensors"))
    calibration, _ = trained.load_split(data / trained.data, "train")
    test, _ = trained.load_split(data / trained.data, "test")
    return Subject("MNIST efficient-KAN 784-64-10", model.eval(), calibration[:1000], test)


def convolution(data: Path | None, checkpoints: Path | None) -> Subject:
    """Load the CIFAR-10 model on crops of its images, so that emulation takes minutes, or one with seeded weights."""
    model = kagn_conv.build().eval()
    assert isinstance(model, kagn_conv.KAGNClassifier)
    if data is None or checkpoints is None:
        x = torch.randn(1200, 3, _CROP, _CROP, generator=torch.Generator().manual_seed(0))
        return Subject("seeded KAGN convolutions", Convolutions(model), x[:200], x[200:])
    trained = MODELS["cifar10_kagn"]
    model.load_state_dict(load_file(checkpoints / "cifar10_kagn.safetensors"))
    middle = slice(16 - _CROP // 2, 16 + _CROP // 2)
    calibration = trained.load_split(data / trained.data, "train")[0][:500, :, middle, middle]
    test = trained.load_split(data / trained.data, "test")[0][:, :, middle, middle]
    return Subject(f"CIFAR-10 KAGN convolutions, {_CROP} x {_CROP} crops", Convolutions(model), calibration, test)


def hard_inputs(compiled: CompiledModel, test: Tensor, count: int) -> tuple[NDArray[np.float32], int]:
    """Make inputs: half from the test set, a quarter on ties of the first table, a quarter beyond its range.

    Returns:
        inputs ``[count, ...]``, and how many single values are exact ties.
    """
    program = compiled.program
    first = program.module(program.layers()[0].expansions[0])
    assert isinstance(first, TableExpansion)
    index = first.index
    generator = torch.Generator().manual_seed(0)
    x = test.repeat(-(-count // len(test)), *[1] * (test.dim() - 1))[:count].clone()
    quarter = count // 4
    step = torch.tensor(index.scale, dtype=torch.float32)
    rows = torch.randint(0, index.levels - 1, x[:quarter].shape, generator=generator)
    x[:quarter] = (rows - index.zero_point + 0.5) * step
    low, high = index.low, index.high
    x[quarter : 2 * quarter] = low + (torch.rand(x[:quarter].shape, generator=generator) * 3 - 1) * (high - low)
    quotient = x[:quarter] / step
    return x.numpy(), int((quotient - quotient.floor() == 0.5).sum())


@dataclass(frozen=True)
class _OwnProcess:
    """A file that a Python of its own, started by a command, loads on every run."""

    python: tuple[str, ...]
    model: Path

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return run_session(self.python, self.model, x)

    def seconds(self, x: NDArray[np.float32], calls: int) -> list[float]:
        raise KanCompileError("a process of its own: loading takes most of its time")


def versioned(version: str) -> Runtime:
    """Make a runtime of a version of ONNX Runtime, installed on first use."""
    folder = cache_folder() / f"onnxruntime-{version}"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        partial_folder = folder.with_name(f"{folder.name}.partial")
        subprocess.run([*pip, "--target", str(partial_folder), f"onnxruntime=={version}"], check=True)
        partial_folder.rename(folder)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])

    @contextmanager
    def prepare(model: Path, threads: int) -> Iterator[Prepared]:
        yield _OwnProcess(("/usr/bin/env", f"PYTHONPATH={path}", sys.executable), model)

    return Runtime(f"ort-{version}", "ort-cpu", available, prepare, 0, emulated=True)


def measure(subject: Subject, bits: int, count: int, folder: Path) -> tuple[RuntimeComparison, dict[str, object]]:
    """Compile for both formats and compare all runtimes."""
    compiled = kancompile.compile(subject.model, subject.calibration, recipe={"weight_bits": bits})
    folder.mkdir(parents=True, exist_ok=True)
    compiled.save(folder / "model.onnx", force=True)
    compiled.for_target("ort-mobile").save(folder / "model.ort", force=True, shared=True)
    x, ties = hard_inputs(compiled, subject.test, count)
    runtimes = [runtime for name, runtime in RUNTIMES.items() if name.startswith("ort")]
    compared = compare_runtimes(folder / "model.onnx", x, [*runtimes, *map(versioned, VERSIONS)], timed=False)
    simulated = torch.cat([compiled.program(part) for part in torch.from_numpy(x).split(256)]).numpy()
    facts = {
        "model": subject.name,
        "weight_bits": bits,
        "cpu": compiled.recipe.cpu,
        "inputs": count,
        "exact_ties": ties,
        "outside_range": count // 4,
        "onnxruntime": onnxruntime.__version__,
        "differing_from_simulation": int((simulated != RUNTIMES["ort"].run(folder / "model.onnx", x)).sum()),
        "int16_pairs": {layer["name"]: layer["int16_pairs"] for layer in compiled.manifest["layers"]},
        "notes": [note for note in compiled.manifest["notes"] if "int16" in note],
    }
    return compared, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and cifar10.npz")
    parser.add_argument("--checkpoints", type=Path, help="folder with the weights of benchmarks.accuracy")
    parser.add_argument("--models", nargs="+", choices=("mlp", "conv"), default=("mlp", "conv"))
    parser.add_argument("--bits", type=int, nargs="+", default=(8, 4))
    parser.add_argument("--inputs", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/cross_runtime"), help="default: %(default)s")
    arguments = parser.parse_args()
    make = {"mlp": partial(mlp, arguments.data, arguments.checkpoints)}
    make["conv"] = partial(convolution, arguments.data, arguments.checkpoints)
    for name in arguments.models:
        subject = make[name]()
        for bits in arguments.bits:
            folder = arguments.out / f"{name}-w{bits}"
            with quiet(True):
                compared, facts = measure(subject, bits, arguments.inputs, folder)
            print(f"{subject.name}, {bits}-bit weights, {facts['exact_ties']:,} values on exact ties")
            print(compared.table(), flush=True)
            write_results(folder / "results.json", facts | compared.to_dict())


if __name__ == "__main__":
    main()
