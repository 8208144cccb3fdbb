"""Round every weight to its nearest code: the baseline beside which every other method is reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kancompile.passes.rounding_methods.problem import Rounded, RoundingProblem, corrected
from kancompile.passes.rounding_methods.quantizers import ScaleSearch, round_to_nearest, search_scale


@dataclass(frozen=True)
class Uniform:
    """Round to nearest, symmetric, one scale for each output and group.

    Attributes:
        scale_search: how scales are found (see ``quantizers.search_scale``).
        correct_bias: whether the mean output error over the calibration data goes into the bias (Nagel et al.,
            *Data-free quantization* (2019), section 4.2).
    """

    compensates: ClassVar[bool] = False
    quick_columns: ClassVar[float] = math.inf

    scale_search: ScaleSearch = "hessian"
    correct_bias: bool = True

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; draws nothing from ``generator``."""
        weight = problem.weight.float()
        importance = problem.column_moments[1].float() if self.scale_search == "hessian" else None
        if importance is not None:
            # columns that never varied keep a little weight, or their trained values would be clipped at will
            importance = importance + 0.01 * importance.mean().clamp(min=1e-12)
        scale = search_scale(weight, problem.bits, problem.group_sizes, self.scale_search, importance)
        codes = round_to_nearest(weight, scale, problem.group_sizes, problem.bits)
        if self.correct_bias:
            return corrected(problem, codes, scale, ())
        return Rounded(codes, scale, torch.zeros(problem.n_out), (), problem.group_sizes)
