"""float32 arithmetic in integers against the arithmetic of this machine, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kancompile.errors.exceptions import KanCompileError
from kancompile.targets.c99 import arithmetic
from kancompile.targets.c99.arithmetic import mantissas, split_float
from tests.targets.c_programs import STRICT, UNDEFINED

PROGRAM = r"""
#include <stdint.h>
#include <stdio.h>
typedef struct {
    int32_t m;
    int32_t e;
} kan_real;
PIECES
int main(void)
{
    int32_t in[6];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        const kan_real x = kan_from_int(in[0]);
        const kan_real y = kan_product(x, in[1], in[2]);
        const kan_real z = kan_sum(y, kan_product(kan_from_int(in[5]), in[3], in[4]));
        const float found[4] = {kan_float(x), kan_float(y), kan_float(z), kan_float(kan_quotient(z, in[1], in[2]))};
        const int32_t whole[4] = {kan_nearest(y), kan_truncated(y), kan_nearest(z), kan_truncated(z)};
        fwrite(found, sizeof found, 1, stdout);
        fwrite(whole, sizeof whole, 1, stdout);
    }
    return 0;
}
"""


def evaluate(folder: Path, rows: np.ndarray, builtin: bool) -> tuple[np.ndarray, np.ndarray]:
    names = ("MAGNITUDE", "ROUNDED", "FROM_INT", "PRODUCT", "QUOTIENT", "SUM", "NEAREST", "TRUNCATED", "FLOAT")
    pieces = "".join(getattr(arithmetic, name) for name in names)
    text = PROGRAM.replace("PIECES", pieces if builtin else pieces.replace("__GNUC__", "KAN_NEVER"))
    (folder / "a.c").write_text(text)
    subprocess.run(["gcc", *STRICT, *UNDEFINED, "-O1", "a.c", "-o", "a"], cwd=folder, check=True)
    done = subprocess.run([folder / "a"], input=rows.astype(np.int32).tobytes(), capture_output=True, check=True)
    both = np.frombuffer(done.stdout, np.int32).reshape(len(rows), 8)
    return both[:, :4].copy().view(np.float32), both[:, 4:]


@pytest.mark.parametrize("builtin", [True, False])
@pytest.mark.needs("gcc")
def test_operations_equal_float32(builtin: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    # sums of every magnitude; many that float32 must round, and neighbours of powers of two
    a = (rng.integers(-(2**31) + 1, 2**31, n) >> rng.integers(0, 31, n)).astype(np.int64)
    a[: n // 4] = (1 << rng.integers(0, 31, n // 4)) + rng.integers(-2, 3, n // 4)
    b = (rng.integers(-(2**31) + 1, 2**31, n) >> rng.integers(0, 31, n)).astype(np.int64)
    b[::3] = -a[::3] + rng.integers(-3, 4, len(a[::3]))  # cancellation
    a, b = np.clip(a, -(2**31) + 1, 2**31 - 1), np.clip(b, -(2**31) + 1, 2**31 - 1)
    s = (rng.random(n) + 0.5).astype(np.float32) * np.exp2(rng.integers(-24, 3, n)).astype(np.float32)
    s[::5] = np.exp2(rng.integers(-20, 2, len(s[::5]))).astype(np.float32)  # exact ties
    t = (rng.random(n) + 0.5).astype(np.float32) * np.exp2(rng.integers(-60, 3, n)).astype(np.float32)
    t[::3] = s[::3]
    (sm, se), (tm, te) = mantissas(s, "a"), mantissas(t, "a")
    found, whole = evaluate(tmp_path, np.stack([a, sm, se, tm, te, b], 1), builtin)
    x = a.astype(np.float32)
    y = x * s
    z = y + b.astype(np.float32) * t
    np.testing.assert_array_equal(found, np.stack([x, y, z, z / s], 1))
    cut = 1 << 20
    for column, value in ((0, y), (2, z)):
        inside = np.abs(value) < cut
        np.testing.assert_array_equal(whole[inside, column], np.rint(value[inside]))
        np.testing.assert_array_equal(whole[inside, column + 1], np.trunc(np.maximum(value[inside], 0)))
        assert (np.abs(whole[~inside, column]) >= cut).all()
        assert (np.sign(whole[~inside, column]) == np.sign(value[~inside])).all()
    ties = np.abs(y - np.trunc(y)) == 0.5
    assert ties.sum() > 1000


def test_floats_are_split_exactly() -> None:
    for value in (1.0, -0.75, 3.1415927, 1e-30, 2.0**-100, 16777217.0):
        m, e = split_float(value)
        assert m * 2.0**e == np.float32(value)
        assert 1 << 23 <= abs(m) < 1 << 24
    assert split_float(0.0) == (0, 0)


def test_scales_out_of_range_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"layer 'layers\.3': found scales from 1e-35"):
        mantissas(np.array([1e-35, 1.0], np.float32), "layers.3")
