"""Turn the budgets of a recipe into bits for every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.passes.allocate_bits import allocate_bits, front_table, measure_sensitivities
from kancompile.passes.allocation import Allocation
from kancompile.program import Program
from kancompile.progress import say
from kancompile.recipe import Recipe


class BitBudget:
    """Measures sensitivities once and allocates bits as often as the budget has to be corrected.

    Attributes:
        recipe: with ``max_bytes`` or ``bits_average`` set.
        chosen: the last allocation.
    """

    def __init__(self, program: Program, x: Tensor, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        generator = torch.Generator().manual_seed(seed)
        self.sensitivities, self.traces = measure_sensitivities(program, x, generator)
        self.chosen: Allocation | None = None
        self.others = 0

    def allocated(self, others: int = 0) -> tuple[Recipe, dict[str, Any]]:
        """Allocate bits.

        Args:
            others: bytes of the file that are not weights.

        Returns:
            the recipe with bits for every layer, and what to note in the manifest.

        Raises:
            KanCompileError: the budget is below the smallest reachable size, which the message says.
        """
        self.others = max(self.others + 256 if self.chosen else 0, others)
        chosen, front = allocate_bits(self.sensitivities, self._weight_budget())
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

    def weight_bytes(self) -> int:
        """Bytes of the weights as allocated."""
        assert self.chosen is not None
        return self.chosen.bytes

    def _weight_budget(self) -> int:
        count = sum(layer.weights for layer in self.sensitivities)
        budgets = []
        if self.recipe.allocated_bits is not None:
            budgets.append(int(count * self.recipe.allocated_bits / 8) + len(self.sensitivities))
        if self.recipe.max_bytes is not None:
            smallest = sum(min(choice.bytes for choice in layer.choices()) for layer in self.sensitivities)
            if self.recipe.max_bytes - self.others < smallest:
                raise KanCompileError(
                    f"max_bytes {self.recipe.max_bytes}: weights of 2 bits take {smallest} bytes and the rest of the file "
                    f"{self.others}, so the smallest reachable size is {smallest + self.others} bytes; raise the budget "
                    "or use fewer levels"
                )
            budgets.append(self.recipe.max_bytes - self.others)
        return min(budgets)


def check_latency(measure: Callable[[], float], recipe: Recipe) -> float | None:
    """Compare the median time of one sample with the recipe's budget.

    Weight bits do not change it, since all widths compute as int8; so there is one reachable latency, and it is said.

    Raises:
        KanCompileError: the file is slower than the budget.
    """
    if recipe.max_latency_us is None:
        return None
    found = measure() * 1e6
    if found > recipe.max_latency_us:
        raise KanCompileError(
            f"max_latency_us {recipe.max_latency_us:g}: the file takes {found:.4g} us for one sample on this machine, which "
            "is the smallest reachable latency: weights of all widths compute as int8; use a narrower model or more time"
        )
    return found
