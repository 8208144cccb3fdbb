"""Compile eight networks of the sizes of controllers and sensors; set the bytes of their files beside those of their parameters.

Run from the root of the repository::

    python -m benchmarks.small_models --out small_models.json
    python -m benchmarks.small_models --only 2-10-2 --parts    # where the bytes of a file go

Networks 2-10-2, 12-32-2 and 13-32-3 of efficient-KAN, FastKAN and pykan (``pip install kancompile[pykan]``) are trained on smooth
functions of their inputs. Files are compared with their models on samples that neither training nor calibration saw, every output
about its mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from benchmarks.results_file import write_results
from examples.zoo import efficient_kan, fast_kan
from kancompile.data import parameter_bytes
from kancompile.progress import quiet
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.error_measures import ErrorMeasure

SAMPLES, HELD_OUT = 2048, 2048
GOAL_DB, MARGIN_DB = 35.0, 0.7
"""What every output should keep on samples that were not seen, and by how much less they keep than those of the calibration."""


@dataclass(frozen=True)
class SmallModel:
    """A network to be trained.

    Attributes:
        family: how the table calls it.
        widths: input first.
        build: factory, which draws from seeds of its own.
    """

    family: str
    widths: tuple[int, ...]
    build: Callable[[Sequence[int]], nn.Module]

    @property
    def name(self) -> str:
        """Family and widths."""
        return f"{self.family} {'-'.join(map(str, self.widths))}"


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        model: family and widths.
        parameter_bytes: of the float model.
        file_bytes: of the file.
        worst_db: SQNR of the worst output in the file, on samples that were not seen.
        seen_db: the same on the calibration samples.
        exact: whether ONNX Runtime computes the simulation's bits.
        simulated_db: SQNR of the worst output in the file about the simulation, where bits differ; functions in float do.
        notes: what the manifest says about bytes and errors.
    """

    model: str
    parameter_bytes: int
    file_bytes: int
    worst_db: float
    seen_db: float
    exact: bool
    simulated_db: float | None
    notes: tuple[str, ...]

    @property
    def is_small(self) -> bool:
        """Whether the file is smaller than the parameters and precise enough."""
        return self.file_bytes < self.parameter_bytes and self.worst_db >= GOAL_DB


def _pykan(widths: Sequence[int]) -> nn.Module:
    import kan

    model: nn.Module = kan.KAN(width=list(widths), grid=5, k=3, seed=0, auto_save=False).speed()
    return model


MODELS = tuple(
    SmallModel(family, widths, build)
    for family, widths, build in (
        ("efficient-KAN", (2, 10, 2), efficient_kan.build),
        ("efficient-KAN", (12, 32, 2), efficient_kan.build),
        ("efficient-KAN", (13, 32, 3), efficient_kan.build),
        ("FastKAN", (2, 10, 2), fast_kan.build),
        ("FastKAN", (12, 32, 2), fast_kan.build),
        ("FastKAN", (13, 32, 3), fast_kan.build),
        ("pykan", (2, 10, 2), _pykan),
        ("pykan", (13, 32, 3), _pykan),
    )
)


def task(n_in: int, n_out: int, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Draw smooth functions of ``n_in`` inputs in -1 ... 1, as a controller's are: angles, products and saturation."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n_in, 8, generator=generator) / n_in**0.5
    second = torch.randn(8, n_out, generator=generator) / 2

    def target(x: Tensor) -> Tensor:
        hidden = torch.sin(2 * x @ first)
        return torch.tanh(hidden @ second) + 0.3 * (x[:, :1] * x[:, 1:2])

    return target


def trained(small: SmallModel, steps: int = 600) -> tuple[nn.Module, Tensor, Tensor]:
    """Train a network; give it with calibration samples and others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(SAMPLES + HELD_OUT, small.widths[0], generator=generator) * 2 - 1
    y = task(small.widths[0], small.widths[-1])(x)
    model = small.build(small.widths)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        picked = torch.randint(0, SAMPLES, (256,), generator=generator)
        loss = functional.mse_loss(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), x[:SAMPLES], x[SAMPLES:]


def _worst(expected: Tensor, found: Tensor) -> float:
    measure = ErrorMeasure()
    measure.add(expected, found, "small models")
    return measure.worst_db


def _text(simulated_db: float | None) -> str:
    return "equal" if simulated_db is None else f"{simulated_db:.0f} dB"


def measure(small: SmallModel, recipe: dict[str, Any]) -> tuple[Row, bytes]:
    """Train, compile and compare one network."""
    model, x, fresh = trained(small)
    with quiet():
        compiled = kancompile.compile(model, x, recipe=recipe)
    session = RuntimeModel(compiled.model_bytes, 1)
    with torch.no_grad():
        found = [torch.from_numpy(session.run(part.numpy())[0]) for part in (fresh, x)]
        simulated = compiled.program(fresh)
        worst, seen = (_worst(model(part), y) for part, y in zip((fresh, x), found, strict=True))
    size = parameter_bytes(model)
    assert size is not None
    said = tuple(
        note for note in compiled.manifest["notes"] if note.startswith(("size:", "allocation:", "error gate:"))
    )
    exact = torch.equal(found[0], simulated)
    near = None if exact else _worst(simulated, found[0])
    return Row(small.name, size, len(compiled.model_bytes), worst, seen, exact, near, said), compiled.model_bytes


def parts(data: bytes) -> list[str]:
    """Say where the bytes of a file go."""
    model = onnx.load_from_string(data)
    graph = model.graph
    numbers = sum(len(one.raw_data) for one in graph.initializer)
    nodes = sum(node.ByteSize() for node in graph.node)
    metadata = sum(entry.ByteSize() for entry in model.metadata_props)
    constants = sum(one.ByteSize() for one in graph.initializer)
    rest = len(data) - nodes - constants - metadata
    first = (
        f"  {len(graph.node)} nodes {nodes}, {len(graph.initializer)} constants {constants} of which numbers {numbers}"
    )
    largest = sorted(graph.initializer, key=lambda one: -one.ByteSize())[:12]
    kind = onnx.TensorProto.DataType.Name
    return [
        f"{first}, metadata {metadata}, values and the rest {rest}",
        *(f"    {one.ByteSize():6} {one.name} {list(one.dims)} {kind(one.data_type)}" for one in largest),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="part of the names of networks")
    parser.add_argument("--default", action="store_true", help="by the default recipe, not as small files")
    parser.add_argument("--parts", action="store_true", help="say where the bytes of a file go")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    recipe: dict[str, Any] = {} if arguments.default else {"optimize": "size", "goal_sqnr": GOAL_DB + MARGIN_DB}
    rows = []
    print("| network | float parameters | file | ratio | worst output | calibration | bits of the simulation |")
    print("|---|---|---|---|---|---|---|")
    for small in MODELS:
        if arguments.only not in small.name:
            continue
        row, data = measure(small, recipe)
        rows.append(row)
        print(
            f"| {row.model} | {row.parameter_bytes:,} | {row.file_bytes:,} | {row.file_bytes / row.parameter_bytes:.2f} | "
            f"{row.worst_db:.1f} dB | {row.seen_db:.1f} dB | {_text(row.simulated_db)} |",
            flush=True,
        )
        if arguments.parts:
            print("\n".join((*parts(data), *(f"  {note}" for note in row.notes))), flush=True)
    print(f"{sum(row.is_small for row in rows)} of {len(rows)} below their parameters at {GOAL_DB:g} dB or more")
    if arguments.out is not None:
        write_results(arguments.out, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
