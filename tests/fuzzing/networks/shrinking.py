"""Make a failing program smaller while it fails in the same way, and write it as a script that stands alone."""

from __future__ import annotations

import copy
import pprint
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzzing.networks.layouts import network
from tests.fuzzing.networks.one import Drawn
from tests.fuzzing.networks.parts import Spec, Unfit

_SIMPLE = {
    "k": 2, "n_out": 1, "basis": "gauss", "contraction": "linear", "gain": 1.0, "times": 2, "stride": 1, "dilation": 1,
    "groups": 1, "padding": 0, "kernel": 1, "factor": 0.5, "offset": 0.0,
    **dict.fromkeys(("base", "own", "odd_names", "by_feature", "bias"), False),
}  # fmt: skip
_SOURCES = ("parts", "layouts", "judging", "../../saturation", "one")


def shrunk(drawn: Drawn, fails: Callable[[Drawn], bool], seconds: float) -> Drawn:
    """Take the first smaller program that fails again and again, until none does or time is over."""
    until = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for candidate in smaller(drawn):
            if time.monotonic() > until:
                return drawn
            if _fits(candidate) and fails(candidate):
                drawn, progress = candidate, True
                break
    return drawn


def _fits(drawn: Drawn) -> bool:
    try:
        network(drawn["network"], drawn["seed"])
    except (Unfit, KeyError, RuntimeError):
        return False
    return True


def smaller(drawn: Drawn) -> Iterator[Drawn]:
    """Yield programs with something less: parts, keys of the recipe, what is odd about the data, sizes."""
    spec = drawn["network"]
    if spec["heads"]:
        yield {**drawn, "network": {**spec, "heads": []}}
    if spec["second"] is not None:
        yield {**drawn, "network": {**spec, "second": None}}
    if drawn["target"] != "ort-cpu":
        yield {**drawn, "target": "ort-cpu"}
    for trunk in _smaller_parts(spec["trunk"]):
        yield {**drawn, "network": {**spec, "trunk": trunk}}
    for key in drawn["recipe"]:
        if key != "group_size":
            rest = {name: value for name, value in drawn["recipe"].items() if name != key}
            if key == "granularity":
                rest.pop("group_size", None)
            yield {**drawn, "recipe": rest}
    for key, simple in (("kind", "normal"), ("scale", 1.0), ("offset", 0.0), ("samples", 20)):
        if drawn["data"][key] != simple:
            yield {**drawn, "data": {**drawn["data"], key: simple}}
    if len(spec["shape"]) == 1 and spec["shape"][0] > 1:
        yield {**drawn, "network": {**spec, "shape": [spec["shape"][0] // 2]}}


def _smaller_parts(spec: Spec) -> Iterator[Spec]:
    name, about, inside = spec
    if name == "chain":
        for number, _ in enumerate(inside):
            yield [name, about, inside[:number] + inside[number + 1 :]]
    else:
        yield from copy.deepcopy(inside)
    for number, one in enumerate(inside):
        for less in _smaller_parts(one):
            yield [name, about, [*inside[:number], less, *inside[number + 1 :]]]
    for key, simple in _SIMPLE.items():
        if key in about and about[key] != simple:
            yield [name, {**about, key: simple}, inside]


def script(drawn: Drawn, kind: str) -> str:
    """Write a program as one file that needs kancompile and its examples alone."""
    texts = []
    for name in _SOURCES:
        text = (Path(__file__).parent / f"{name}.py").read_text()
        text = re.sub(r"^from (tests|__future__)\b.*\n", "", text, flags=re.MULTILINE)
        texts.append(re.sub(r'\A""".*?"""\n', "", text, flags=re.DOTALL).strip())
    head = f'"""Found by python -m tests.fuzzing.networks: {kind}."""\n\nfrom __future__ import annotations\n'
    shown = pprint.pformat(drawn, width=110, sort_dicts=False)
    end = f"DRAWN = {shown}\n\nif __name__ == '__main__':\n    print(verdict_on(DRAWN))"
    return "\n\n\n".join([head, *texts, end]) + "\n"
