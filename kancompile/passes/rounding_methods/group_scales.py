"""Let groups of inputs have weight scales of their own at no run-time cost.

    scale[g, o] = base[o] * m[g, o]        m whole, so that   scale[g, o] * code = base[o] * (m[g, o] * code)

A product of narrow codes computes in int8 anyway, and codes of 2 bits leave 6 of its 8 bits unused. So a group's scale is
kept as a small whole factor of the output's scale, and the factor is multiplied into the codes when the file is loaded: the
layer stays one integer product. Products stay within 64, so that sums of two of them with uint8 codes fit int16 (what
processors with AVX2 but not VNNI add up in).

The double quantization of scales goes back to Dettmers et al., *QLoRA* (2023), section 3; there it only saves bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.gptq import Gptq, polish_rounded
from kancompile.passes.rounding_methods.problem import Method, Rounded, RoundingProblem, objective, rescaled
from kancompile.passes.rounding_methods.quantizers import Width, code_range, round_to_nearest
from kancompile.passes.rounding_methods.uniform import Uniform

WIDEST_BITS = 3  # from 4 bits on at most 8 multiples are left, which cost more than groups gain
_LARGEST_PRODUCT = 64
_SWEEPS = 10


def largest_multiplier(bits: Width) -> int:
    """Return the largest factor that keeps products with codes of ``bits`` within 64: 32 for 2 bits, 16 for 3."""
    return _LARGEST_PRODUCT // -code_range(bits)[0]


def common_scale(scale: Tensor, bits: Width) -> tuple[Tensor, Tensor]:
    """Write scales as whole multiples of one scale for each output.

    Args:
        scale: float32 ``[g, n_out]``, positive.
        bits: of the codes, ternary, 2 or 3.

    Returns:
        ``base`` float32 ``[n_out]`` and ``m`` int8 ``[g, n_out]``, at least 1; scales that are multiples already stay.
    """
    most = largest_multiplier(bits)
    base = scale.amax(0) / most
    return base, torch.round(scale / base).clamp(1, most).to(torch.int8)


def snap_scales(problem: RoundingProblem, rounded: Rounded) -> Rounded:
    """Move group scales to their multiples and keep the mean output where it was."""
    base, multiplier = common_scale(rounded.scale, problem.bits)
    snapped = replace(rounded, scale=base * multiplier)
    mean, _ = problem.column_moments
    moved = (rounded.dequantized() - snapped.dequantized()).double() @ mean
    return replace(snapped, offset=(rounded.offset.double() + moved).float())


def settle_group_scales(problem: RoundingProblem, rounded: Rounded, method: Method) -> Rounded:
    """Move group scales to their multiples and choose codes again that suit them.

    Args:
        problem: the layer.
        rounded: its rounding with free scales.
        method: what rounded it: after nearest rounding codes are rounded to nearest again, else they are polished.

    Returns:
        a rounding whose scales are multiples; a note says what that cost.
    """
    snapped = snap_scales(problem, rounded)
    own = problem if rounded.column_scale is None else rescaled(problem, rounded.column_scale)
    if isinstance(method, Uniform):
        codes = round_to_nearest(own.weight, snapped.scale, own.group_sizes, own.bits)
    else:
        codes = polish_rounded(own, snapped, Gptq(refine_scale=False), _SWEEPS).codes
    settled = replace(snapped, codes=codes)
    mean, _ = problem.column_moments
    moved = (snapped.dequantized() - settled.dequantized()).double() @ mean
    settled = replace(settled, offset=(snapped.offset.double() + moved).float())
    best = min(snapped, settled, key=lambda candidate: objective(problem, candidate))
    note = (
        f"{len(rounded.group_sizes)} scale groups in one product: mean squared output error {objective(problem, rounded):.4g}, "
        f"{objective(problem, best):.4g} with whole multiples"
    )
    return replace(best, notes=(*rounded.notes, note))
