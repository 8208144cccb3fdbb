"""What newcomers do wrong, by the names of docs/troubleshooting.md; every call raises, or returns what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kancompile
from kancompile.data import load_model
from tests.compiled_kan import N_IN, N_OUT, make_inputs, make_model

FACTORY = "tests.compiled_kan:make_model"


class _Wrapped(nn.Module):
    """The model of these tests, called in some way."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()


class TwoInputs(_Wrapped):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.model(x) + condition  # type: ignore[no-any-return]


class WithoutForward(_Wrapped):
    pass


class Misspelled(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.modle(x)  # type: ignore[no-any-return, operator, unused-ignore]


class Doubled(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.model(x), torch.eye(N_OUT).double())


class Choosing(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if x.sum() > 0 else -self.model(x)  # type: ignore[no-any-return]


class Frame:
    """As pandas' DataFrame answers, with a column of words."""

    columns = ("age", "city")

    def to_numpy(self) -> Any:
        return np.array([[40.0, "Bonn"]] * 20, dtype=object)


def compiled(calibration: Any = None, model: nn.Module | None = None, **options: Any) -> str:
    """Compile, and return what is said of it."""
    calibration = make_inputs() if calibration is None else calibration
    made = kancompile.compile(make_model() if model is None else model, calibration, **options)
    return "\n".join([*made.manifest["notes"], *made.manifest["calibration"]["notes"]])


def validated(data: Any, calibration: Any = None, **limits: Any) -> str:
    made = kancompile.compile(make_model(), make_inputs() if calibration is None else calibration)
    result = made.validate(data, **limits)
    return "\n".join([*result.notes, *result.reasons, result.table()])


def _labels(n: int = 120) -> Tensor:
    with torch.no_grad():
        return make_model()(make_inputs(n)).argmax(1)


class Uneven(Dataset[Tensor]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> Tensor:
        return torch.zeros(N_IN + number % 2)


def _csv(folder: Path, *lines: str) -> str:
    (folder / "train.csv").write_text("\n".join(lines))
    return str(folder / "train.csv")


def _npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def _raw_pixels() -> Tensor:
    pixels = torch.randint(0, 256, (100, N_IN), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels[0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    return pixels


def _broken(value: float) -> Tensor:
    x = make_inputs()
    x[3, 2] = value
    return x


def _whole_object(folder: Path) -> None:
    torch.save(make_model(), folder / "whole.pt")
    load_model(FACTORY, folder / "whole.pt")


def _other_sizes(folder: Path) -> None:
    from examples.zoo.efficient_kan import KAN

    other = KAN([N_IN, 9, N_OUT], torch.Generator().manual_seed(0))
    torch.save(other.state_dict(), folder / "kan.pt")
    load_model(FACTORY, folder / "kan.pt")


def _untrusted(folder: Path) -> None:
    (folder / "kan.pt2").write_bytes(b"anything")
    load_model(str(folder / "kan.pt2"))


def _saved_twice(folder: Path) -> None:
    made = kancompile.compile(make_model(), make_inputs())
    made.save(folder / "kan.onnx")
    made.save(folder / "kan.onnx")


def _used_iterator() -> None:
    batches = iter(make_inputs().split(30))
    list(batches)
    compiled(batches)


MISTAKES: dict[str, Callable[[Path], Any]] = {
    # the model
    "a function that the file does not have": lambda _: load_model("tests.compiled_kan:make_kan"),
    "a checkpoint of other sizes": _other_sizes,
    "a checkpoint that is a pickled object": _whole_object,
    "a `.pt2` file without `--trust-model`": _untrusted,
    "weights in float64": lambda _: compiled(model=make_model().double()),
    "weights in half": lambda _: compiled(model=make_model().half()),
    "weights in bfloat16": lambda _: compiled(model=make_model().bfloat16()),
    "float64 in the code of `forward`": lambda _: compiled(model=Doubled()),
    "weights on another device": lambda _: compiled(model=make_model().to("meta")),
    "one array for two inputs": lambda _: compiled(model=TwoInputs()),
    "no `forward`": lambda _: compiled(model=WithoutForward()),
    "an error in the model's own code": lambda _: compiled(model=Misspelled()),
    "a choice that depends on data": lambda _: compiled(model=Choosing()),
    "a state dict in place of a model": lambda _: compiled(model=make_model().state_dict()),  # type: ignore[arg-type]
    # the data
    "raw bytes (uint8)": lambda _: compiled(_raw_pixels()),
    "raw pixels as floats": lambda _: compiled(_raw_pixels().float()),
    "data that were not normalized": lambda _: compiled(40 + 25 * make_inputs()),
    "test data scaled otherwise": lambda _: validated(100 * make_inputs(), min_sqnr=-100),
    "NaN": lambda _: compiled(_broken(float("nan"))),
    "infinity": lambda _: compiled(_broken(float("inf"))),
    "five samples": lambda _: compiled(make_inputs(5)),
    "forty samples": lambda _: compiled(make_inputs(40)),
    "one sample": lambda _: compiled(make_inputs(1)),
    "a data frame with words": lambda _: compiled(Frame()),
    "a table with a row that is too short": lambda folder: compiled(_csv(folder, "1,2,3", "1,2")),
    "a table with a cell that is empty": lambda folder: compiled(_csv(folder, "a,b", "1,")),
    "a table that includes the target": lambda folder: compiled(_csv(folder, *["1,2,3,4,5,6,0", "6,5,4,3,2,1,1"] * 10)),
    "a data set of samples of different sizes": lambda _: compiled(Uneven()),
    "labels as third argument": lambda _: kancompile.compile(make_model(), make_inputs(), _labels()),
    "two batches as a tuple": lambda _: compiled((make_inputs(60), make_inputs(60))),
    "an iterator that was used before": lambda _: _used_iterator(),
    "images for a model of flat inputs": lambda _: compiled(make_inputs().reshape(-1, 2, 3)),
    "another number of features": lambda _: compiled(make_inputs()[:, :4]),
    "labels for fewer samples": lambda _: compiled((make_inputs(), _labels()[:50])),
    "one-hot labels": lambda _: validated((make_inputs(), nn.functional.one_hot(_labels(), N_OUT).float())),
    "an array of another name": lambda folder: compiled(
        _npz(folder, images=make_inputs().numpy(), y=_labels().numpy(), z=1)
    ),
    "words among the numbers": lambda _: compiled(np.array([["a"] * N_IN] * 20)),
    "`max_drop` without labels": lambda _: validated(make_inputs(), max_drop=0.5),
    "labels that are all equal": lambda _: validated((make_inputs(), torch.full((120, N_OUT), 0.25)), max_drop=0.5),
    # the recipe
    "a recipe key with a typing error": lambda _: compiled(recipe={"weight_bit": 4}),
    "bits that there are not": lambda _: compiled(recipe={"weight_bits": 16}),
    "a method with a typing error": lambda _: compiled(recipe={"method": "gtpq"}),
    "a layer that there is not": lambda _: compiled(recipe={"layers": {"layer.0": {"weight_bits": 4}}}),
    "groups without a size": lambda _: compiled(recipe={"granularity": "group"}),
    "a target with a typing error": lambda _: compiled(target="ort-gpu"),
    "a recipe file that is not there": lambda folder: compiled(recipe=str(folder / "recipe.toml")),
    "a limit out of reach": lambda _: compiled(recipe={"min_sqnr": 400}),
    "too few bytes": lambda _: compiled(recipe={"max_bytes": 900}),
    "a file that is there already": _saved_twice,
}
