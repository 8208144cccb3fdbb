"""Turn the budgets of a recipe into bits for every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kancompile.errors import KanCompileError
from kancompile.ir import Program, Values
from kancompile.passes import Allocation, allocate_bits, front_table, measure_sensitivities
from kancompile.progress import say
from kancompile.recipe import Recipe


class BitBudget:
    """Measures sensitivities once and allocates bits as often as the budget has to be corrected.

    Attributes:
        recipe: with ``max_bytes`` or ``bits_average`` set.
        chosen: the last allocation.
    """

    def __init__(self, program: Program, x: Values, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        generator = torch.Generator().manual_seed(seed)
        self.sensitivities, self.traces = measure_sensitivities(program, x, generator)
        self.chosen: Allocation | None = None
        self.others = 0
        self._refused: list[int] = []

    def allocated(self, others: int = 0) -> tuple[Recipe, dict[str, Any]]:
        """Allocate bits; the fewest where a size budget leaves no room for them, as only a file tells what it really takes.

        Args:
            others: bytes of the file that are not weights.

        Returns:
            the recipe with bits for every layer, and what to note in the manifest.

        Raises:
            KanCompileError: an average below what weights can be stored in.
        """
        self.others = max(self.others + 256 if self.chosen else 0, others)
        return self._allocate(self._weight_budget())

    def _allocate(self, weight_bytes: int) -> tuple[Recipe, dict[str, Any]]:
        chosen, front = allocate_bits(self.sensitivities, weight_bytes)
        self.chosen = chosen
        for line in front_table(front, chosen):
            say(line)
        noted = {
            "probes": self.traces.probes,
            "layers": {
                layer.layer: {
                    str(bits): dict(zip(layer.parts, cost.tolist(), strict=True))
                    for bits, cost in layer.by_bits.items()
                }
                for layer in self.sensitivities
            },
            "pareto_front": [
                {
                    "weight_bytes": entry.bytes,
                    "sensitivity": entry.sensitivity,
                    "bits": {layer: choice.bits for layer, choice in entry.choices.items()},
                }
                for entry in front
            ],
        }
        return self.recipe.with_bits({layer: choice.bits for layer, choice in chosen.choices.items()}), noted

    @property
    def smallest(self) -> int:
        """Bytes of all weights in the fewest bits."""
        return sum(min(choice.bytes for choice in layer.choices()) for layer in self.sensitivities)

    def again(self, file_bytes: int, bytes_with: Callable[[int], int]) -> tuple[Recipe, dict[str, Any]]:
        """Allocate again, since the file came out larger than ``max_bytes``.

        Tables, biases and the graph take room too, and how much is known once a file exists. The last attempts are the fewest
        bits, and then the most: codes of 8 bits need no nodes that unpack them, which is smaller where layers are tiny.

        Args:
            file_bytes: size of the file with the bits as allocated.
            bytes_with: gives it for another budget, whose digits stand in the file as well.

        Raises:
            KanCompileError: nothing fits; the message says the smallest reachable size.
        """
        assert self.chosen is not None
        if self.chosen.bytes > self.smallest and not self._refused:
            return self.allocated(others=file_bytes - self.chosen.bytes)
        while (size := bytes_with(file_bytes)) > file_bytes:
            file_bytes = size
        self._refused.append(file_bytes)
        if len(self._refused) == 1 and self._largest() < file_bytes:
            return self._allocate(self._largest())
        raise KanCompileError(
            f"max_bytes {self.recipe.max_bytes}: the smallest reachable size is {min(self._refused)} bytes, of which weights "
            f"take at least {self.smallest}, and tables, scales and the graph the rest; raise the budget or use "
            "fewer table rows (levels)"
        )

    def _largest(self) -> int:
        """Bytes of all weights in the most bits that an average allows."""
        widest = sum(max(choice.bytes for choice in layer.choices()) for layer in self.sensitivities)
        return widest if self.recipe.allocated_bits is None else min(widest, self._average_budget())

    def _average_budget(self) -> int:
        assert self.recipe.allocated_bits is not None
        count = sum(layer.weights for layer in self.sensitivities)
        return int(count * self.recipe.allocated_bits / 8) + len(self.sensitivities)

    def _weight_budget(self) -> int:
        budgets = []
        if self.recipe.allocated_bits is not None:
            budgets.append(self._average_budget())
        if self.recipe.max_bytes is not None:
            budgets.append(max(self.recipe.max_bytes - self.others, self.smallest))
        return min(budgets)
