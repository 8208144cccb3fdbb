"""float32 arithmetic in integers: ONNX Runtime's requantization, reproduced bit for bit without a floating-point unit.

A value is ``m * 2^e`` with a 24-bit magnitude ``m``; every operation rounds half to even to 24 bits as IEEE 754 does. Exponents
are not bounded: results that float32 would make infinite or subnormal differ, and a table saturates at both.
"""

from __future__ import annotations

import math

import numpy as np

from kancompile.errors import KanCompileError
from kancompile.targets.c99.steps import Array

_EXPONENTS = range(-127, 128)


def mantissas(values: Array, layer: str) -> tuple[Array, Array]:
    """Write float32 values as ``m * 2^e``: int32 and int8 arrays.

    Raises:
        KanCompileError: a value is not a normal float32 of moderate size.
    """
    found = [split_float(float(value)) for value in np.asarray(values, np.float32).ravel()]
    if any(exponent not in _EXPONENTS for _, exponent in found):
        raise KanCompileError(
            f"target 'c99': layer {layer!r}: found scales from {np.min(values):.3g} to {np.max(values):.3g}, expected "
            "magnitudes between 2^-103 and 2^127; rescale the model"
        )
    shape = np.shape(values)
    return (
        np.array([m for m, _ in found], np.int32).reshape(shape),
        np.array([e for _, e in found], np.int8).reshape(shape),
    )


def split_float(value: float) -> tuple[int, int]:
    """Write a float32 value as ``m * 2^e`` with ``2^23 <= |m| < 2^24``, or ``m = 0``."""
    fraction, exponent = math.frexp(np.float32(value))
    return (int(fraction * (1 << 24)), exponent - 24) if fraction else (0, 0)


MAGNITUDE = r"""
static uint32_t kan_magnitude(int32_t x)
{
    return x < 0 ? 0u - (uint32_t)x : (uint32_t)x;
}
"""

ROUNDED = r"""
/* Round m * 2^e to 24 bits, half to even. */
static kan_real kan_rounded(int negative, uint64_t m, int32_t e)
{
    kan_real r;
    int32_t excess = 0;
    uint32_t kept;
    if (m == 0) {
        r.m = 0;
        r.e = 0;
        return r;
    }
#ifdef __GNUC__
    excess = 40 - __builtin_clzll(m);
#else
    while (m >> excess >= 1u << 24)
        excess++;
    if (excess == 0) {
        while (m << -excess < 1u << 23)
            excess--;
    }
#endif
    if (excess > 0) {
        const uint64_t rest = m & (((uint64_t)1 << excess) - 1);
        const uint64_t half = (uint64_t)1 << (excess - 1);
        kept = (uint32_t)(m >> excess);
        if (rest > half || (rest == half && (kept & 1u) != 0))
            kept++;
        if (kept == 1u << 24) {
            kept >>= 1;
            excess++;
        }
    } else {
        kept = (uint32_t)m << -excess;
    }
    r.m = negative ? -(int32_t)kept : (int32_t)kept;
    r.e = e + excess;
    return r;
}
"""

FROM_INT = r"""
static kan_real kan_from_int(int32_t x)
{
    return kan_rounded(x < 0, kan_magnitude(x), 0);
}
"""

PRODUCT = r"""
static kan_real kan_product(kan_real a, int32_t m, int32_t e)
{
    return kan_rounded((a.m < 0) != (m < 0), (uint64_t)kan_magnitude(a.m) * kan_magnitude(m), a.e + e);
}
"""

NEAREST = r"""
/* The nearest integer, half to even; magnitudes beyond 2^20 are cut there, where every table has ended. */
static int32_t kan_nearest(kan_real a)
{
    const uint32_t m = kan_magnitude(a.m);
    uint32_t whole;
    if (a.e >= -3) {
        whole = m == 0 ? 0 : 1u << 20;
    } else if (a.e < -25) {
        whole = 0;
    } else {
        const uint32_t rest = m & ((1u << -a.e) - 1), half = 1u << (-a.e - 1);
        whole = m >> -a.e;
        if (rest > half || (rest == half && (whole & 1u) != 0))
            whole++;
    }
    return a.m < 0 ? -(int32_t)whole : (int32_t)whole;
}
"""

TRUNCATED = r"""
/* The integer part of a number, 0 of negative ones; beyond 2^20 it is cut there, where every table has ended. */
static int32_t kan_truncated(kan_real a)
{
    if (a.m <= 0 || a.e < -23)
        return 0;
    return a.e >= -3 ? (int32_t)1 << 20 : a.m >> -a.e;
}
"""

SUM = r"""
static kan_real kan_sum(kan_real a, kan_real b)
{
    kan_real large = a, small = b;
    int64_t total;
    if (a.m == 0 || (b.m != 0 && a.e < b.e)) {
        large = b;
        small = a;
    }
    if (small.m == 0 || large.e - small.e > 38)
        return large;
    total = large.m * ((int64_t)1 << (large.e - small.e)) + small.m;
    return kan_rounded(total < 0, total < 0 ? (uint64_t)-total : (uint64_t)total, small.e);
}
"""

QUOTIENT = r"""
static kan_real kan_quotient(kan_real a, int32_t m, int32_t e)
{
    const uint64_t top = (uint64_t)kan_magnitude(a.m) << 38;
    const uint32_t bottom = kan_magnitude(m);
    uint64_t q = top / bottom;
    if (q * bottom != top)
        q |= 1u; /* far below the last bit that is kept: only says that there is more */
    return kan_rounded((a.m < 0) != (m < 0), q, a.e - 38 - e);
}
"""

CLIPPED = r"""
static int32_t kan_clipped(int32_t row, int32_t last)
{
    return row < 0 ? 0 : row > last ? last : row;
}
"""

SIGNED = r"""
/* Sums are kept modulo 2^32; what they stand for fits an int32. */
static int32_t kan_signed(uint32_t x)
{
    return x > 0x7FFFFFFFu ? -(int32_t)(~x) - 1 : (int32_t)x;
}
"""

FLOAT = r"""
/* The float of equal value. */
static float kan_float(kan_real a)
{
    float y = (float)a.m;
    int32_t e = a.e;
    for (; e > 0; e--)
        y *= 2.0f;
    for (; e < 0; e++)
        y *= 0.5f;
    return y;
}
"""
