"""Measure how well outputs do the task that labels set: accuracy, overlap of masks, or R2."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kancompile.errors import KanCompileError

CLASSES, MASKS, VALUES = "classes", "masks", "values"
_NAMES = {"r2": "R2", "iou": "IoU", "rmse": "rmse", "accuracy": "accuracy"}
_PROBABILITY_MARGIN = 0.05


@dataclass(frozen=True)
class Score:
    """A measure of a task: accuracy or overlap in percent, or R2.

    Attributes:
        name: ``"accuracy"``, ``"iou"`` or ``"r2"``.
        value: its value.
    """

    name: str
    value: float

    @property
    def points(self) -> float:
        """The value in points: of percent, or hundredths of R2."""
        return points(self.name, self.value)

    def text(self) -> str:
        """Write it for people."""
        return f"{_NAMES[self.name]} {number_of(self.name, self.value)}"


@dataclass
class _Overlap:
    """Counts of two-class decisions, for outputs that are logits (cut at 0) and for probabilities (cut at 0.5)."""

    both: list[int] = field(default_factory=lambda: [0, 0])
    either: list[int] = field(default_factory=lambda: [0, 0])
    right: list[int] = field(default_factory=lambda: [0, 0])
    decisions: list[list[Tensor]] = field(default_factory=lambda: [[], []])

    def add(self, labels: Tensor, output: Tensor, keep: bool) -> None:
        for number, cut in enumerate((0.0, 0.5)):
            found, wanted = output > cut, labels > 0.5
            self.both[number] += int((found & wanted).sum())
            self.either[number] += int((found | wanted).sum())
            self.right[number] += int((found == wanted).sum())
            if keep:
                self.decisions[number].append((found == wanted).flatten())


class TaskMetric:
    """Accumulates how well outputs predict labels.

    * Classes: labels ``[n]`` or ``[n, *]`` of whole numbers with outputs ``[n, classes]``, ``[n, classes, *]`` or
      ``[n, *, classes]``; labels ``[n, classes]`` with a single one in every row; labels 0 and 1 with one output. Accuracy in
      percent.
    * Masks of two classes: labels 0 and 1 of the outputs' shape. Intersection over union and accuracy, in percent. Outputs are
      cut at 0, or at 0.5 where all of them are probabilities.
    * Values: anything else of the outputs' shape. R2, averaged over the outputs with equal weights, or pooled where some do
      not vary; and the root mean squared error.

    Attributes:
        count: samples seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._right: list[Tensor] = []
        self._overlap = _Overlap()
        self._low, self._high = torch.inf, -torch.inf
        self._squares: Tensor | None = None
        self._labels: list[Tensor] = []
        self._elements = 0
        self._is_classes: bool | None = None
        self._is_zero_one = self._has_single_one = True
        self._ones = 0

    def add(self, labels: Tensor, output: Tensor, what: str) -> None:
        """Take one batch.

        Raises:
            KanCompileError: labels that such an output cannot be compared with.
        """
        n, n_out = len(output), output[0].numel()
        flat = labels.reshape(n, -1)
        self.count += n
        scores = _scores(labels, output)
        if scores is not None:
            self._add_classes(flat.flatten(), scores, what)
            return
        if flat.shape[1] != n_out:
            raise KanCompileError(
                f"{what} labels: found {flat.shape[1]} values a sample, expected {n_out} as the model has outputs"
                + (", or one class number a sample" if output.ndim == 2 and n_out > 1 else "")
            )
        self._expect(False, what)
        values, wanted = output.reshape(n, -1).double(), flat.double()
        self._is_zero_one = self._is_zero_one and bool(((wanted == 0) | (wanted == 1)).all())
        self._has_single_one = (
            self._has_single_one and output.ndim == 2 and n_out > 1 and bool((wanted.sum(1) == 1).all())
        )
        if self._is_zero_one:
            self._ones += int(wanted.sum())
            self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
            self._overlap.add(wanted, values, keep=n_out == 1)
            if self._has_single_one:
                self._right.append(values.argmax(1) == wanted.argmax(1))
        squares = (values - wanted).square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares
        self._labels.append(wanted)  # two passes: a running variance would cancel for targets far from zero

    def _add_classes(self, wanted: Tensor, scores: Tensor, what: str) -> None:
        self._expect(True, what)
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= scores.shape[1]:
            raise KanCompileError(
                f"{what} labels: found classes {low} ... {high}, expected 0 ... {scores.shape[1] - 1} as the model has "
                f"{scores.shape[1]} outputs"
            )
        self._right.append(scores.argmax(1) == wanted)

    def _expect(self, is_classes: bool, what: str) -> None:
        if self._is_classes not in (None, is_classes):
            raise KanCompileError(
                f"{what} labels: found class numbers in some batches and values in others, expected one kind"
            )
        self._is_classes = is_classes

    @property
    def kind(self) -> str:
        """What the labels are: :data:`CLASSES`, :data:`MASKS` or :data:`VALUES`."""
        if self._is_classes:
            return CLASSES
        # a target of nothing but 0, or nothing but 1, is rather a constant than a class
        if not self._is_zero_one or not 0 < self._ones < self.count * self._n_out:
            return VALUES
        return CLASSES if self._has_single_one or self._n_out == 1 else MASKS

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about how the labels were read."""
        if self._is_classes or self.kind != CLASSES or self._n_out == 1:
            return ()
        return (f"labels: a single one in every row, read as the numbers of {self._n_out} classes",)

    @property
    def decisions(self) -> Tensor | None:
        """Whether each decision was right, bool ``[n]``; ``None`` where the task is none of classes."""
        if self.kind != CLASSES or not self.count:
            return None
        parts = self._right if self._is_classes or self._n_out > 1 else self._overlap.decisions[self._cut]
        return torch.cat(parts)

    def values(self) -> dict[str, float]:
        """Return the measures by name; the first one is what a drop is measured in."""
        decisions = self.decisions
        if decisions is not None:
            return {"accuracy": 100 * float(decisions.double().mean())}
        if self.kind == MASKS:
            either, right = self._overlap.either[self._cut], self._overlap.right[self._cut]
            # no mask at all and none found is a perfect overlap
            iou = 100.0 * self._overlap.both[self._cut] / either if either else 100.0
            return {"iou": iou, "accuracy": 100.0 * right / (self.count * self._n_out)}
        return self._regression()

    @property
    def score(self) -> Score | None:
        """The measure that a drop is measured in; ``None`` where labels do not vary, so that it has no meaning."""
        name, value = next(iter(self.values().items()))
        return None if name == "rmse" else Score(name, value)

    def _regression(self) -> dict[str, float]:
        assert self._squares is not None
        labels = torch.cat(self._labels)
        spread = (labels - labels.mean(0)).square().sum(0)
        rmse = float((self._squares.sum() / labels.numel()).sqrt())
        if bool((spread > 0).all()):
            return {"r2": float((1 - self._squares / spread).mean()), "rmse": rmse}
        pooled = float(spread.sum())  # about each output's own mean, constant ones count with their error alone
        return {"r2": 1 - float(self._squares.sum()) / pooled, "rmse": rmse} if pooled > 0 else {"rmse": rmse}

    @property
    def _n_out(self) -> int:
        return 0 if self._squares is None else len(self._squares)

    @property
    def _cut(self) -> int:
        is_probability = self._low >= -_PROBABILITY_MARGIN and self._high <= 1 + _PROBABILITY_MARGIN
        return 1 if is_probability else 0


def _scores(labels: Tensor, output: Tensor) -> Tensor | None:
    """Give the scores of all decisions, ``[decisions, classes]``, where labels are class numbers; else ``None``."""
    n, places = len(output), tuple(labels.shape[1:])
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        return None
    if output.ndim == 2 and output.shape[1] > 1 and labels.numel() == n:
        return output
    if output.ndim >= 3 and places == tuple(output.shape[2:]) and output.shape[1] > 1:
        return output.movedim(1, -1).flatten(0, -2)
    if output.ndim >= 3 and places == tuple(output.shape[1:-1]) and output.shape[-1] > 1:
        return output.flatten(0, -2)
    return None


def number_of(name: str, value: float) -> str:
    """Write a measure's value: accuracy and overlap are percentages, R2 and errors are numbers."""
    return f"{value:.2f} %" if name in ("accuracy", "iou") else f"{value:.4f}" if name == "r2" else f"{value:.4g}"


def title(name: str) -> str:
    """Return a measure's name for people."""
    return _NAMES[name]


def points(name: str, change: float) -> float:
    """Give a change of a measure in points: of percent, or hundredths of R2."""
    return 100 * change if name == "r2" else change
