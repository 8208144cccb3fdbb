"""Keep nearest rounding wherever another method turns out worse on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kancompile.passes.rounding_methods.problem import Method, Rounded, RoundingProblem, objective
from kancompile.passes.rounding_methods.uniform import Uniform


@dataclass(frozen=True)
class Guarded:
    """A method whose result is compared with a baseline after all codes are integers; the better one is kept."""

    method: Method
    baseline: Method = field(default_factory=Uniform)

    @property
    def compensates(self) -> bool:
        """Whether the method does."""
        return self.method.compensates

    @property
    def quick_columns(self) -> float:
        """Those of the method."""
        return self.method.quick_columns

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; a note says what was kept, with both errors."""
        rounded = self.method(problem, generator)
        baseline = self.baseline(problem, generator)
        error, limit = objective(problem, rounded), objective(problem, baseline)
        name, baseline_name = type(self.method).__name__.lower(), type(self.baseline).__name__.lower()
        if error <= limit:
            note = f"{name} chosen: mean squared output error {error:.4g}, {baseline_name} {limit:.4g}"
            return replace(rounded, notes=(*rounded.notes, note))
        note = f"{baseline_name} chosen: mean squared output error {limit:.4g}, {name} {error:.4g}"
        return replace(baseline, notes=(*rounded.notes, note))


def with_guard(method: Method) -> Method:
    """Return the method with :class:`Guarded` around it; nearest rounding stays as it is."""
    return method if isinstance(method, Uniform) else Guarded(method)
