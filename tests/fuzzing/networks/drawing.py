"""Draw networks, data and recipes: every one from its number, as plain data that JSON holds."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch

from tests.fuzzing.networks.layouts import CHANNELS, network
from tests.fuzzing.networks.one import Drawn
from tests.fuzzing.networks.parts import BASES, CONTRACTIONS, FAMILIES, POINTWISE, Spec, Unfit, built

TARGETS = ("ort-cpu",) * 7 + ("ort-mobile", "c99", "c99", "qnn", "litert")
METHODS = ("uniform", "gptq", "awq", "awq+gptq", "adaround", "awq+adaround", "brecq", "hawq-v2")
LAYERS = ("kan", "kan", "zoo", "linear")
IMAGES = ("conv", "conv", "conv", "zoo conv", "last")


def drawn(number: int, again: int = 0) -> Drawn:
    """Draw a program; what does not fit together is drawn again.

    ``again`` draws another recipe and target for the same network and data, the first of which are number 0.
    """
    attempt = 0
    while True:
        chance = random.Random(f"network {number} {attempt}")
        attempt += 1
        try:
            spec = _network(chance)
            network(spec, 0)
        except Unfit:
            continue
        if not _has_functions([spec["trunk"], *spec["heads"]]):
            continue
        one = len(spec["heads"]) < 2 and spec["second"] is None
        target = chance.choice(TARGETS) if one else "ort-cpu"
        program = {
            "network": spec, "seed": chance.randrange(1000), "data": _data(chance), "target": target,
            "recipe": _recipe(chance, target),
        }  # fmt: skip
        if again:
            chance = random.Random(f"recipe {number} {again}")
            target = chance.choice(TARGETS) if one else "ort-cpu"
            program |= {"target": target, "recipe": _recipe(chance, target)}
        return program


def _has_functions(specs: list[Spec]) -> bool:
    """Say whether there is a layer with functions of its own; plain networks are refused."""
    return any(
        name in ("kan", "zoo", "zoo conv") or (name == "conv" and about["basis"] != "none") or _has_functions(inside)
        for name, about, inside in specs
    )


def _network(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(("vector", "vector", "vector", "vector", "tokens", "image", "image"))
    n = chance.choice((1, 2, 3, 3, 4, 6, 24))  # of many inputs pairs share look-ups
    side = chance.choice((3, 4, 5))
    shapes = {
        "vector": (n,), "tokens": (chance.choice((1, 2, 3)), max(2, n)),
        "image": chance.choice(((n, 6), (n, side, side), (min(n, 2), side, side), (1, 3, 3, 3))),
    }  # fmt: skip
    shape = shapes[kind]
    second = chance.choice((None, None, None, "float", "ids")) if kind == "vector" else None
    trunk, after = _chain(chance, shape, chance.choice((1, 1, 2)), depth=0)
    if chance.random() < 0.15:
        trunk[2].insert(0, ["affine", {"factor": 10.0 ** chance.randint(-3, 3), "offset": 0.0}, []])
    heads = [_layer(chance, after) for _ in range(chance.choice((0, 0, 0, 2)))] if len(after) < 3 else []
    return {
        "shape": list(shape), "trunk": trunk, "heads": heads, "second": second, "second_size": chance.choice((1, 3)),
        "names": chance.random() < 0.5,
    }  # fmt: skip


def _shape_after(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    return built(spec, shape, torch.Generator().manual_seed(0)).shape  # type: ignore[return-value]


def _chain(chance: random.Random, shape: tuple[int, ...], layers: int, depth: int) -> tuple[Spec, tuple[int, ...]]:
    """Draw layers and what stands between them."""
    inside: list[Spec] = []

    def add(spec: Spec) -> None:
        nonlocal shape
        shape = _shape_after(spec, shape)
        inside.append(spec)

    for _ in range(layers):
        if chance.random() < 0.35:
            _try(add, _between(chance, shape))
        wires = chance.random() < (0.35 if depth < 1 else 0.1 if depth < 2 else 0)
        try:
            add(_wired(chance, shape, depth) if wires else _layer(chance, shape))
        except Unfit:
            add(_layer(chance, shape))
    if len(shape) > 1 and depth == 0 and chance.random() < 0.6:
        ways = ["flat"] if len(shape) > 2 else ["flat", "mean", "max", "first", "last"]
        how = chance.choice(ways)
        _try(add, ["reshape", {"how": "flat"}, []] if how == "flat" else ["tokens", {"how": how}, []])
        if chance.random() < 0.7:
            add(_layer(chance, shape))
    if chance.random() < 0.2:
        _try(add, _between(chance, shape))
    return ["chain", {"odd_names": True} if chance.random() < 0.05 else {}, inside], shape


def _try(add: Any, spec: Spec) -> None:
    with contextlib.suppress(Unfit):
        add(spec)


def _layer(chance: random.Random, shape: tuple[int, ...], n_out: int | None = None) -> Spec:
    n_out = chance.choice((1, 2, 3, 4, 5)) if n_out is None else n_out
    if len(shape) > 2 or (len(shape) == 2 and shape[-1] > 5 and chance.random() < 0.5):
        return _image_layer(chance, shape, n_out)
    kind = chance.choice(LAYERS)
    if kind == "zoo":
        return ["zoo", {"family": chance.choice(list(FAMILIES)), "widths": [n_out]}, []]
    if kind == "linear":
        return ["linear", {"n_out": n_out, "bias": chance.random() < 0.7}, []]
    about: dict[str, Any] = {
        "n_out": n_out, "k": chance.choice((1, 2, 3, 5)), "basis": chance.choice(list(BASES)),
        "contraction": chance.choice(CONTRACTIONS),
    }  # fmt: skip
    about |= {key: True for key in ("base", "own") if chance.random() < 0.3}
    if chance.random() < 0.15:
        about["gain"] = chance.choice((1e-3, 1e3, 0.0))
    return ["kan", about, []]


def _image_layer(chance: random.Random, shape: tuple[int, ...], n_out: int) -> Spec:
    kind = chance.choice(IMAGES)
    if kind == "last":
        return ["last", {}, [_layer(chance, (shape[0],), n_out)]]
    if kind == "zoo conv" and len(shape) == 3 and min(shape[1:]) >= 3:
        return [
            "zoo conv",
            {"family": chance.choice(("kagn", "spline")), "n_out": n_out, "padding": chance.choice((0, 1))},
            [],
        ]
    kernel = chance.choice((1, 2, 3) if min(shape[1:]) >= 3 else (1,))
    about: dict[str, Any] = {"n_out": n_out, "basis": chance.choice(list(CHANNELS)), "kernel": kernel}
    about["padding"] = chance.choice((0, kernel // 2))
    for key, value, share in (("stride", 2, 0.2), ("dilation", 2, 0.1), ("by_feature", True, 0.4), ("bias", True, 0.3)):
        if chance.random() < share and not (
            key == "dilation" and min(shape[1:]) + 2 * about["padding"] < 2 * kernel - 1
        ):
            about[key] = value
    if shape[0] > 1 and n_out % shape[0] == 0 and chance.random() < 0.4:
        about["groups"] = shape[0]
    return ["conv", about, []]


def _between(chance: random.Random, shape: tuple[int, ...]) -> Spec:
    """Draw what stands between layers."""
    kinds = ["norm", "norm", "pointwise", "pointwise", "affine"]
    kinds += {1: ["select", "reshape"], 2: ["select", "tokens", "transpose"]}.get(len(shape), ["pool", "pool"])
    kind = chance.choice(kinds)
    if kind == "norm":
        return ["norm", {"kind": chance.choice(("layer", "batch", "rms"))}, []]
    if kind == "pointwise":
        return ["pointwise", {"function": chance.choice(list(POINTWISE))}, []]
    if kind == "affine":
        about = {"factor": chance.choice((0.5, -2.0, 1e-4, 1e4)), "offset": chance.choice((0.0, 1.0, 100.0))}
        return ["affine", about | ({"own": True} if chance.random() < 0.3 else {}), []]
    if kind == "select":
        return ["select", {"how": chance.choice(("permute", "flip", "first", "constant", "twice", "every"))}, []]
    if kind == "reshape":
        return ["reshape", {"how": chance.choice(("tokens", "line", "image", "volume"))}, []]
    if kind == "transpose":
        return ["reshape", {"how": "transpose"}, []]
    if kind == "pool":
        return ["pool", {"how": chance.choice(("max", "average", "all"))}, []]
    how = chance.choice(("positions", "attention", "class", "cumulative", "loop"))
    return ["tokens", {"how": how}, [_layer(chance, (2 * shape[-1],), shape[-1])] if how == "loop" else []]


def _wired(chance: random.Random, shape: tuple[int, ...], depth: int) -> Spec:
    """Draw layers that are wired otherwise than in a row."""
    how = chance.choice(("residual", "residual", "cat", "dense", "sum", "product", "gate", "row", "same", "halves"))
    features = shape[0] if len(shape) > 2 else shape[-1]

    def path(n_out: int | None, ends_in: int | None = None) -> Spec:
        if len(shape) > 2:
            about = {"n_out": n_out or features, "basis": chance.choice(list(CHANNELS)), "padding": 1}
            return ["conv", about, []]
        if ends_in is None and chance.random() < 0.6:
            return _layer(chance, shape, n_out)
        chain, after = _chain(chance, shape, 1, depth + 1)
        if n_out is not None and after != (*shape[:-1], n_out):
            chain[2].append(_layer(chance, after, n_out))
        return chain

    if how in ("residual", "gate"):
        return ["join", {"how": how}, [path(features)]]
    if how in ("cat", "dense"):
        return ["join", {"how": how}, [path(None) for _ in range(2 if how == "cat" else 1)]]
    if how in ("sum", "product"):
        n_out = chance.choice((1, 3))
        return ["join", {"how": how}, [path(n_out), path(n_out)]]
    if how == "halves":
        half = (*shape[:-1], max(1, shape[-1] // 2))
        return ["again", {"how": "halves"}, [_layer(chance, half)]]
    return ["again", {"how": how, "times": chance.choice((2, 3))}, [path(features if how == "row" else None)]]


def _data(chance: random.Random) -> dict[str, Any]:
    about: dict[str, Any] = {
        "samples": chance.choice((2, 3, 8, 20, 64, 64, 150, 150, 300)) if chance.random() < 0.98 else 1,
        "kind": chance.choice(("normal", "normal", "uniform", "heavy", "levels", "constant feature", "constant", "one outlier")),
        "scale": 1.0, "offset": 0.0, "seed": chance.randrange(1000),
    }  # fmt: skip
    if about["kind"] == "constant" and chance.random() < 0.6:
        about["kind"] = "normal"
    if chance.random() < 0.25:
        about["scale"] = 10.0 ** chance.randint(-6, 6)
    if chance.random() < 0.2:
        about["offset"] = chance.choice((-3.0, 1.0, 100.0, 1e4)) * about["scale"]
    return about


def _recipe(chance: random.Random, target: str) -> dict[str, Any]:
    recipe: dict[str, Any] = {"goal_sqnr": None} if chance.random() < 0.8 else {}
    keys = (
        ("method", 0.35, chance.choice(METHODS)),
        ("weight_bits", 0.3, chance.randint(2, 8)),
        ("levels", 0.15, chance.choice((4, 7, 64, 256, 257, 5000))),
        ("range", 0.2, chance.choice(("minmax", "percentile"))),
        ("percentile", 0.1, chance.choice((50.0, 90.0, 100.0))),
        ("column_scaling", 0.1, chance.choice((0.0, 0.5, 1.0))),
        ("function_error", 0.15, chance.choice((0.0, 1e-5, 1e-2))),
        ("lookup", 0.2, chance.choice(("each", "joint"))),
        ("drift", 0.15, chance.choice(("on", "off"))),
        ("precision", 0.2, chance.choice(("int16", "float"))),
        ("storage", 0.2, chance.choice(("native", "fastest"))),
        ("bits_average", 0.07, chance.choice((2.5, 4.0, 7.0))),
        ("max_bytes", 0.03, chance.choice((10_000, 30_000))),
        ("for_batch", 0.1, chance.choice((1, 256))),
        ("profile", 0.1, chance.choice(("x86", "aarch64"))),
        ("goal_sqnr", 0.1, chance.choice((10.0, 45.0))),
        ("min_sqnr", 0.05, chance.choice((-1000.0, 15.0))),
        ("calibration_samples", 0.1, chance.choice((2, 50))),
        ("table_bits", 0.1, chance.choice((2, 3, 5, 7))),
        ("weight_bits", 0.05, "ternary"),
    )
    recipe |= {key: value for key, share, value in keys if chance.random() < share}
    if chance.random() < 0.15:
        recipe |= {"granularity": "group", "group_size": chance.choice((1, 2, 5))}
    elif chance.random() < 0.1:
        recipe["granularity"] = "branch"
    if recipe.get("lookup") == "joint" and (
        recipe.get("function_error") == 0 or recipe.get("granularity", "channel") != "channel"
    ):
        del recipe["lookup"]
    if target in ("ort-cpu", "ort-mobile") and chance.random() < 0.2:
        recipe["cpu"] = chance.choice(("x86-vnni", "x86-avx2", "arm64"))
    if target == "ort-cpu" and chance.random() < 0.05:
        recipe["batch"] = chance.choice((1, 4))
    if chance.random() < 0.1:
        recipe["layers"] = {"*": {chance.choice(("precision", "lowering")): "int16"}}
        if "lowering" in recipe["layers"]["*"]:
            recipe["layers"] = {"*": {"lowering": "keep"}}
    return recipe
