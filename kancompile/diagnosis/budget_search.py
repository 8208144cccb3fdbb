"""Look for the least error within so many bytes: what an allocation gives, what a hand would try, and what improves on these.

Three sources of candidates, each measured in full:

* the points of the compiler's allocation of bits and rows (``optimize = "accuracy"``);
* the most bits, and the most rows, with which all layers together fit;
* from the best of these, one key of one layer or of all layers at a time: a bit more, the next number of rows, another rounding
  method, range or column scaling. What is better is kept, until nothing is or as many were tried as a compilation may try.

So what is found is no worse than one key changed by hand for all layers or for one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kancompile.compiler import ROW_LADDER, Allocator, LayerTrials, trials_for
from kancompile.diagnosis.laboratory import Laboratory, Outcome
from kancompile.errors import KanCompileError
from kancompile.passes import quick_methods
from kancompile.progress import quiet, say
from kancompile.recipe import RANGES, SettledRecipe

Changes = Mapping[str, Mapping[str, Any]]
_GAIN_DB = 0.05
_WIDTHS = tuple(range(8, 1, -1))


@dataclass(frozen=True)
class _Allocated:
    """What a memory remembers of an allocation: JSON of the changes of its points."""

    points: str


class BudgetSearch:
    """Searches the recipes of one model whose files take at most ``max_bytes``.

    Attributes:
        recipe: where it begins.
        changes: of the best recipe found, by layer; ``None`` while nothing fits.
        outcome: what that one is worth.
    """

    def __init__(self, laboratory: Laboratory, recipe: SettledRecipe, max_bytes: int) -> None:
        self.laboratory, self.recipe, self.max_bytes = laboratory, recipe, max_bytes
        self.names = laboratory.integer_layers(recipe)
        self.changes: Changes | None = None
        self.outcome: Outcome | None = None
        self._left = trials_for(laboratory.program, laboratory.x) // 2

    def run(self) -> None:
        """Measure all candidates, from those of an allocation on."""
        if not self.names:
            return
        self._considered({})
        for changes in self._allocated():
            self._considered(changes)
        for key, ladder in (("weight_bits", _WIDTHS), ("levels", ROW_LADDER[::-1])):
            most = self._most_that_fits(key, ladder)
            if most is not None:  # what needs fewer bytes has more error
                self._considered(self._everywhere(key, most))
        while self.changes is not None and self._improved():
            pass

    def _everywhere(self, key: str, value: Any) -> Changes:
        return {name: {key: value} for name in self.names}

    def _most_that_fits(self, key: str, ladder: tuple[int, ...]) -> int | None:
        """Give the first value, the most bytes first, with which files fit when all layers have it."""
        if not self._fits(self._everywhere(key, ladder[-1])):
            return None
        first, last = 0, len(ladder) - 1
        while first < last:
            middle = (first + last) // 2
            fits = self._fits(self._everywhere(key, ladder[middle]))
            first, last = (first, middle) if fits else (middle + 1, last)
        return ladder[last]

    def _allocated(self) -> list[Changes]:
        """Give the points that the compiler's allocation measures; none where it finds no file that fits."""
        laboratory = self.laboratory
        fact = {"fact": "allocation", "recipe": self.recipe.whole.canonical_json(), "max_bytes": self.max_bytes}
        known = None if laboratory.memory is None else laboratory.memory.get(fact, _Allocated)
        if known is None:
            wanted = replace(self.recipe.whole, optimize="accuracy", max_bytes=self.max_bytes)
            trials = LayerTrials(laboratory.program, laboratory.x, laboratory.lowered)
            allocator = Allocator(
                laboratory.program, trials, lambda recipe, _: laboratory.file_bytes(self._plain(recipe))
            )
            try:
                with quiet():
                    allocator.choose(SettledRecipe(wanted, self.recipe.layers))
            except KanCompileError:  # no file fits: what was measured may still be where a search begins
                pass
            points = [{name: dict(change) for name, change in point.changes.items()} for point in allocator.points]
            known = _Allocated(json.dumps(points))
            if laboratory.memory is not None:
                laboratory.memory.put(fact, known)
        found: list[Changes] = json.loads(known.points)
        return found

    def _plain(self, recipe: SettledRecipe) -> SettledRecipe:
        """Give a recipe of the allocation as the file will hold it."""
        whole = replace(recipe.whole, optimize=self.recipe.whole.optimize, max_bytes=self.recipe.whole.max_bytes)
        return SettledRecipe(whole, recipe.layers)

    def _fits(self, changes: Changes) -> bool:
        try:
            return self.laboratory.file_bytes(self.recipe.with_overrides(changes)) <= self.max_bytes
        except KanCompileError:  # functions without such a form
            return False

    def _considered(self, changes: Changes) -> bool:
        """Measure a candidate; whether it is the best now."""
        try:
            found = self.laboratory.outcome(self.recipe.with_overrides(changes))
        except KanCompileError:  # functions without such a form
            return False
        if self.outcome is not None and not found.worst_db >= self.outcome.worst_db + _GAIN_DB:
            return False
        if not self._fits(changes):
            return False
        self.changes, self.outcome = changes, found
        say(f"tune: within {self.max_bytes:,} bytes {found.worst_db:.2f} dB at the worst output")
        return True

    def _improved(self) -> bool:
        """Change one key at a time, of all layers and of each, and keep what is better; whether anything was."""
        scopes = ([self.names] if len(self.names) > 1 else []) + [[name] for name in self.names]
        has_improved = False
        for scope in scopes:
            for change in self._steps(self.changes or {}, scope):
                if self._left <= 0:
                    return False
                self._left -= 1
                changed = {name: {**(self.changes or {}).get(name, {}), **change.get(name, {})} for name in self.names}
                has_improved |= self._considered({name: keys for name, keys in changed.items() if keys})
        return has_improved

    def _steps(self, best: Changes, scope: list[str]) -> Iterator[Changes]:
        """Yield the next values of every key for some layers."""
        now = self.recipe.with_overrides(best)
        if all(now[name].bits < 8 and not now[name].is_ternary for name in scope):
            yield {name: {"weight_bits": now[name].bits + 1} for name in scope}
        rows = {name: next((r for r in ROW_LADDER if r > (now[name].levels or 0)), None) for name in scope}
        if all(now[name].levels is not None and rows[name] is not None for name in scope):
            yield {name: {"levels": rows[name]} for name in scope}
        program = self.laboratory.program
        for method in quick_methods(max(program.contraction(program.layer(name)).products for name in scope)):
            if any(now[name].rounding_method != method for name in scope):
                yield {name: {"method": method} for name in scope}
        for kind in RANGES:
            if any(now[name].range != kind for name in scope):
                yield {name: {"range": kind} for name in scope}
        for exponent in (1.0, 0.5):
            if any(now[name].column_scaling != exponent for name in scope):
                yield {name: {"column_scaling": exponent} for name in scope}
