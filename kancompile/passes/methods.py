"""The rounding methods by the names that recipes use."""

from __future__ import annotations

from kancompile.errors import KanCompileError
from kancompile.passes.adaround import AdaRound
from kancompile.passes.awq import Awq
from kancompile.passes.brecq import Brecq
from kancompile.passes.gptq import Gptq
from kancompile.passes.uniform import Uniform
from kancompile.rounding import Method

METHODS: dict[str, Method] = {
    "uniform": Uniform(),
    "gptq": Gptq(),
    "awq": Awq(inner=Uniform()),
    "awq+gptq": Awq(inner=Gptq()),
    "adaround": AdaRound(),
    "awq+adaround": Awq(inner=AdaRound()),
    "brecq": Brecq(),
}


def method_named(name: str) -> Method:
    """Return a method by its name.

    Raises:
        KanCompileError: there is none of that name.
    """
    if name not in METHODS:
        raise KanCompileError(f"method {name!r} is unknown, expected one of {sorted(METHODS)!r}")
    return METHODS[name]
