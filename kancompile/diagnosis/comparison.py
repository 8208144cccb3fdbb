"""Compare rounding methods and bit widths on one model: every cell lowered by one ``Lowering``, measured on the same samples.

A cell is what ``compile`` with that method and width makes, without the error gate that would refine it towards a goal: the
method is compared, not what makes up for it. All is computed in one thread, since threads share sums out among them, so that
the table is the same however many processes measure it.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from kancompile.compiler import prepare_model
from kancompile.data import float32_by_default, opened
from kancompile.diagnosis.comparison_cells import Cell, CellFiles
from kancompile.diagnosis.diagnosing import open_laboratory, samples_for
from kancompile.diagnosis.laboratory import Laboratory
from kancompile.diagnosis.measurement_key import depends_on
from kancompile.errors import KanCompileError
from kancompile.passes import in_one_thread
from kancompile.progress import quiet, say, track
from kancompile.recipe import Recipe, SettledRecipe, read_recipe
from kancompile.validation import Printed, Score, aligned, number_of, plain_number

COMPARED_METHODS = ("uniform", "gptq", "awq+gptq")
COMPARED_BITS = (8, 6, 4, 3, 2)
CELLS = "cells"
_WAIT_SECONDS = 0.2
_COLUMNS = (
    "method", "weight_bits", "metric", "float_score", "score", "score_low", "score_high", "lost", "lost_low", "lost_high",
    "p_value", "agreement", "sqnr_db", "worst_db", "constant_bytes", "file_bytes", "refused",
)  # fmt: skip
Asked = tuple[str, int | str]


@dataclass(frozen=True)
class Comparison(Printed):
    """Methods and widths side by side.

    Attributes:
        cells: in the order asked for, method by method.
        float_score: accuracy, overlap or R2 of the float model, ``None`` without labels.
        judged_on: which samples judged, in words.
        recipe: what all cells have in common.
    """

    cells: tuple[Cell, ...]
    float_score: Score | None
    judged_on: str
    recipe: Recipe

    def __repr__(self) -> str:
        return self.table()

    def rows(self) -> list[dict[str, Any]]:
        """Return one mapping a cell, plain data for CSV and JSON: points, dB, bytes; ``None`` where nothing is known."""
        return [self._row(cell) for cell in self.cells]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        score = None if self.float_score is None else self.float_score.value
        return {
            "judged_on": self.judged_on,
            "float_score": plain_number(score),
            "recipe": self.recipe.to_dict(),
            "cells": self.rows(),
        }

    def csv(self) -> str:
        """Write the table as CSV, one row a cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def table(self) -> str:
        """Print for people; ``*`` marks what no other cell beats in both bytes and quality."""
        front = self._front()
        task = "accuracy" if self.float_score is None else self.float_score.name
        has_score = self.float_score is not None
        has_intervals = any(cell.outcome is not None and cell.outcome.paired is not None for cell in self.cells)
        head = ["method", "bits", *([task, "lost"] if has_score else [])]
        head += [*(["95 % interval"] if has_intervals else []), "SQNR dB", "worst", "bytes", ""]
        rows = [head]
        for cell in self.cells:
            if cell.outcome is None:
                rows.append([cell.method, str(cell.weight_bits), *["-"] * (len(head) - 3), cell.refused])
                continue
            outcome = cell.outcome
            line = [cell.method, str(cell.weight_bits)]
            if has_score:
                shown = "-" if outcome.score is None else number_of(task, outcome.score)
                line += [shown, "-" if outcome.drop is None else f"{outcome.drop:+.2f}"]
            if has_intervals:
                paired = outcome.paired
                line.append("-" if paired is None else "{:+.2f} ... {:+.2f}".format(*paired.interval))
            rows.append(
                [
                    *line,
                    f"{outcome.sqnr_db:.1f}",
                    f"{outcome.worst_db:.1f}",
                    f"{cell.file_bytes:,}",
                    "*" if cell in front else "",
                ]
            )
        lines = [f"measured on {self.judged_on}"]
        if self.float_score is not None:
            lines[0] += f"; float model: {self.float_score.text()}"
        lines += aligned(rows, last_left=True)
        lines.append("* no other cell is both smaller and better; without the refinement that --goal-sqnr brings")
        return "\n".join(lines)

    def _row(self, cell: Cell) -> dict[str, Any]:
        outcome = cell.outcome
        row: dict[str, Any] = dict.fromkeys(_COLUMNS)
        row |= {"method": cell.method, "weight_bits": cell.weight_bits, "refused": cell.refused}
        if outcome is None:
            return row
        row |= {
            "metric": outcome.metric,
            "float_score": None if self.float_score is None else plain_number(self.float_score.value),
            "score": plain_number(outcome.score),
            "lost": plain_number(outcome.drop),
            "agreement": plain_number(outcome.agreement),
            "sqnr_db": plain_number(outcome.sqnr_db),
            "worst_db": plain_number(outcome.worst_db),
            "constant_bytes": outcome.constant_bytes,
            "file_bytes": cell.file_bytes,
        }
        if outcome.paired is not None:
            (row["score_low"], row["score_high"]) = outcome.paired.accuracy_interval
            (row["lost_low"], row["lost_high"]) = outcome.paired.interval
            row["p_value"] = outcome.paired.p_value
        return row

    def _front(self) -> list[Cell]:
        """Find the cells that none beats in bytes and in the score, the SQNR where there are no labels."""

        def quality(cell: Cell) -> tuple[float, float]:
            assert cell.outcome is not None
            score = cell.outcome.score
            return (0.0 if score is None else score), cell.outcome.sqnr_db

        measured = [cell for cell in self.cells if cell.outcome is not None and cell.file_bytes is not None]
        front = []
        for cell in measured:
            beaten = any(
                (other.file_bytes or 0) <= (cell.file_bytes or 0)
                and quality(other) >= quality(cell)
                and ((other.file_bytes or 0) < (cell.file_bytes or 0) or quality(other) > quality(cell))
                for other in measured
            )
            if not beaten:
                front.append(cell)
        return front


@float32_by_default()
@in_one_thread()
def compare(
    model: Any,
    calibration: Any,
    data: Any = None,
    *,
    methods: Sequence[str] = COMPARED_METHODS,
    bits: Sequence[int | str] = COMPARED_BITS,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    force: bool = False,
    held_out: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
    judged_on: str | None = None,
    trust: bool = False,
) -> Comparison:
    """Measure every method at every width; capture, tables and float outputs are made once.

    Args:
        model: as for :func:`kancompile.compile`.
        calibration: samples to calibrate with.
        data: samples to judge with, with labels if there are any; ``None`` holds out a part of the calibration samples.
        methods: rounding methods, as the recipe's key ``method``.
        bits: widths, as the recipe's key ``weight_bits``.
        recipe: what all cells have in common.
        folder: keeps one file a cell, with which an interrupted run goes on; ``None`` keeps none.
        processes: that measure; more than one needs a ``folder``, and Linux.
        force: whether cells of another model or of other data in the folder are measured again.
        held_out: share held out where there is no ``data``.
        seed: of every random choice.
        device: where rounding methods keep their matrices.
        judged_on: which samples judge, in words, where the caller knows better.
        trust: as for :func:`kancompile.compile`.

    Raises:
        KanCompileError: bad input, cells of something else in the folder, or processes without a folder.
    """
    whole = replace(read_recipe(recipe), goal_sqnr=None, min_sqnr=None, max_bytes=None, bits_average=None)
    asked = [(method, width) for method in dict.fromkeys(methods) for width in dict.fromkeys(bits)]
    recipes, known = _recipes(whole, asked)
    if not asked:
        raise KanCompileError("compare: found no method or no width, expected at least one of each")
    if processes < 1 or (processes > 1 and folder is None):
        raise KanCompileError(
            f"compare: found {processes} processes{' and no folder' if processes > 1 else ''}, expected at least 1, and a folder "
            "for their cells where there are more"
        )
    model = opened(model, trust)
    fitting, judging, judges = samples_for(calibration, data, whole, held_out, seed, model=model)
    laboratory = open_laboratory(model, fitting, judging, whole, seed, device, trust=trust)
    context = depends_on(laboratory) | {"recipe": whole.canonical_json()}
    files = None if folder is None else CellFiles(Path(folder) / CELLS, context, force)
    before = {} if files is None else {cell: found for cell in recipes if (found := files.read(*cell)) is not None}
    if before:
        say(f"compare: {len(before)} of {len(recipes)} cells were measured before")
    known |= before
    pending = [cell for cell in asked if cell not in known]
    float_score = laboratory.float_score(laboratory.judging)  # and the float outputs, before processes divide

    def measure(cell: Asked) -> Cell:
        found = _measured(laboratory, recipes[cell])
        if files is not None:
            files.write(found)
        return found

    if processes > 1 and len(pending) > 1 and files is not None:
        _in_processes(pending, measure, processes)
        known |= {cell: found for cell in pending if (found := files.read(*cell)) is not None}
        pending = [cell for cell in pending if cell not in known]  # what broke a process breaks here, too
    for cell in track(pending, "comparing"):
        known[cell] = measure(cell)
    return Comparison(tuple(known[cell] for cell in asked), float_score, judged_on or judges, whole)


def _recipes(whole: Recipe, asked: Sequence[Asked]) -> tuple[dict[Asked, Recipe], dict[Asked, Cell]]:
    """Give every cell its recipe, and those that no recipe can ask for as refused.

    Raises:
        KanCompileError: a method or a width that there is not.
    """
    recipes, refused = {}, {}
    for method, width in asked:
        replace(whole, method=method), replace(whole, method="auto", weight_bits=width)
        try:
            recipes[method, width] = replace(whole, method=method, weight_bits=width)
        except KanCompileError as error:
            refused[method, width] = Cell(method, width, None, None, str(error).removeprefix("recipe: "))
    return recipes, refused


def _measured(laboratory: Laboratory, recipe: Recipe) -> Cell:
    """Measure a recipe; what a method cannot do is said in the cell."""
    try:
        with quiet():
            settled = _settled(laboratory, recipe)
            outcome = laboratory.outcome(settled)
            return Cell(recipe.method, recipe.weight_bits, outcome, laboratory.file_bytes(settled))
    except KanCompileError as error:
        return Cell(recipe.method, recipe.weight_bits, None, None, str(error))


def _settled(laboratory: Laboratory, recipe: Recipe) -> SettledRecipe:
    if recipe.method != "hawq-v2":
        return laboratory.settled(recipe)
    # bits are allocated to layers first
    program, device = laboratory.program, laboratory.device
    return prepare_model(None, laboratory.fitting, recipe, laboratory.seed, device, captured=program).recipe


def _in_processes(cells: Sequence[Asked], measure: Callable[[Asked], Cell], count: int) -> None:
    """Let forked processes, which share what is prepared, take one cell after the other."""
    if sys.platform != "linux":
        say("compare: a prepared model can be shared by processes on Linux alone; going on in one")
        return
    context = multiprocessing.get_context("fork")
    taken, done = context.Value("i", 0), context.Value("i", 0)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        torch.set_num_threads(1)  # the threads of a parent are not there in its child
        while (cell := _taken(cells, taken)) is not None:
            measure(cell)
            with done.get_lock():
                done.value += 1

    with quiet():
        workers = [context.Process(target=work, daemon=True) for _ in range(min(count, len(cells)))]  # type: ignore[attr-defined]
        for worker in workers:
            worker.start()
    try:
        for _ in track(_steps(workers, done), f"comparing in {len(workers)} processes", len(cells)):
            pass
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _taken(cells: Sequence[Asked], taken: Any) -> Asked | None:
    with taken.get_lock():
        number = int(taken.value)
        taken.value += 1
    return cells[number] if number < len(cells) else None


def _steps(workers: Sequence[BaseProcess], done: Any) -> Iterator[int]:
    """Yield once for every cell that is done, until no process is left."""
    seen = 0
    while True:
        alive = any(worker.is_alive() for worker in workers)
        while seen < done.value:
            seen += 1
            yield seen
        if not alive:
            return
        time.sleep(_WAIT_SECONDS)
