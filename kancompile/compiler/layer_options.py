"""What every layer may get: widths of its weights, rows of its tables and fewer functions, each measured alone.

Each layer is lowered alone, all others in float: for some widths of its weights by the rounding method of the recipe, and for
every number of rows and every share of its variance that fewer functions may lose with weights of 8 bits rounded to nearest,
which takes a tenth of the time. Errors of weights and those of tables add up in variance, so options are the pairs of both; but
inputs that are looked up jointly have other weights, whose widths are measured with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kancompile.compiler.ladder import chooses_rows
from kancompile.compiler.layer_trials import LayerTrials, Trial
from kancompile.compiler.manifest import constant_bytes
from kancompile.compiler.option_choice import Option
from kancompile.ir import Program
from kancompile.progress import say
from kancompile.recipe import LayerRecipe, SettledRecipe

BITS: tuple[int, ...] = (8, 7, 6, 5, 4, 3)
ROWS: tuple[int, ...] = (32, 48, 64, 96, 128, 192, 256, 512, 1024)
_MEASURED_BITS: tuple[int, ...] = (8, 6, 4, 3)
"""A bit more leaves a quarter of the noise of weights, from which that of a width between two of these follows."""
_FEW_BITS: tuple[int, ...] = (8, 6, 4)
_JOINT_BITS: tuple[int, ...] = (8, 4, 3)
_FEW_ROWS: tuple[int, ...] = (64, 256)
_FINEST = 2048
_CHANNEL_SHARES, _JOINT_SHARES = (5e-5, 1e-3, 4e-3), (3e-4, 1.2e-3, 5e-3)
"""Shares of variance that fewer functions of channels, and of inputs that are looked up jointly, may lose."""
_JOINT_FROM, _JOINT_SAMPLES = 512, 1000
"""Columns and samples from which on inputs are looked up jointly on trial."""
_FINER_ROWS: tuple[int, ...] = (4096, 8192)
"""Rows that are measured where those above do not reach a goal."""
_FUSED_ROWS = 256
"""Rows that one kernel hands over as bytes; more take a Cast and a Clip."""
_NEAREST = {"method": "uniform"}


def fewest_trials(layers: int) -> int:
    """Count the trials that the fewest options of so many layers take."""
    return layers * (len(_FEW_BITS) + 1 + len(_FEW_ROWS))


def layer_options(
    captured: Program, trials: LayerTrials, recipe: SettledRecipe, names: Sequence[str]
) -> dict[str, list[Option]]:
    """Measure what every layer may get; nothing where trials do not suffice.

    Args:
        captured: the float program.
        trials: that lower its layers.
        recipe: the choices so far; what it says of a layer stays.
        names: of the layers that are integers.

    Returns:
        options by layer.
    """
    enough = len(names) * (len(_MEASURED_BITS) + 1 + len(ROWS)) <= trials.left
    bits, rows = (_MEASURED_BITS, ROWS) if enough else (_FEW_BITS, _FEW_ROWS)
    is_fast = recipe.whole.optimize == "speed"
    if is_fast:
        rows = tuple(count for count in rows if count <= _FUSED_ROWS)
    found: dict[str, list[Option]] = {}
    for name in names:
        say(f"allocation: measuring layer {name} ...")
        layer, has_rows = recipe[name], chooses_rows(captured, name)
        finest = {"levels": layer.levels or _FINEST} if has_rows else {}
        nearest = {} if layer.is_ternary else _NEAREST
        widths = [layer.weight_bits] if layer.is_ternary else bits
        ways = [{"levels": count} for count in rows] if has_rows and layer.levels is None else []
        functions = _functions_of(captured, name, layer, trials.samples)
        is_joint = any("lookup" in way for way in functions)
        ways += [] if is_joint else functions
        by_bits = {width: trials.trial(recipe, name, {"weight_bits": width, **finest}) for width in widths}
        known = trials.trial(recipe, name, {"weight_bits": widths[0], **finest, **nearest}) if ways else None
        others = [(way, trials.trial(recipe, name, {"weight_bits": widths[0], **way, **nearest})) for way in ways]
        full = by_bits[widths[0]]
        if full is None:
            return {}
        if not layer.is_ternary:
            by_bits = with_widths_between(by_bits)
        in_float = constant_bytes(captured, name)
        found[name] = [
            Option({"weight_bits": width, **finest}, in_float + one.extra_bytes, one.noise, one.nanoseconds)
            for width, one in by_bits.items()
            if one is not None and not (is_fast and others)
        ]
        for way in functions if is_joint else ():
            measured = widths if layer.is_ternary else _JOINT_BITS
            joint = {width: trials.trial(recipe, name, {"weight_bits": width, **way}) for width in measured}
            found[name] += [
                Option({"weight_bits": width, **way}, in_float + one.extra_bytes, one.noise, one.nanoseconds)
                for width, one in (joint if layer.is_ternary else with_widths_between(joint)).items()
                if one is not None
            ]
        if known is None:
            continue
        found[name] += [
            Option(
                {"weight_bits": width, **way},
                # fewer functions have fewer weights, of which each takes fewer bits
                in_float
                + other.extra_bytes
                + (one.extra_bytes - full.extra_bytes) * other.weights // max(1, full.weights),
                one.noise + (other.noise - known.noise).clamp(min=0),
                other.nanoseconds,
            )
            for width, one in by_bits.items()
            for way, other in others
            if one is not None and other is not None
        ]
    return found


def with_widths_between(by_bits: Mapping[Any, Trial | None]) -> dict[Any, Trial | None]:
    """Add the widths between measured ones, whose weights bring a quarter of the noise for every bit more.

    Args:
        by_bits: measured trials by the bits of weights.
    """
    found: dict[Any, Trial | None] = {}
    for width in BITS:
        if width in by_bits or width < min(by_bits):
            found[width] = by_bits.get(width)
            continue
        most, fewest = min(bits for bits in by_bits if bits > width), max(bits for bits in by_bits if bits < width)
        above, below = by_bits[most], by_bits[fewest]
        if above is not None and below is not None:
            share = (4.0**-width - 4.0**-most) / (4.0**-fewest - 4.0**-most)  # of n + w * 4^-bits
            noise = above.noise + (below.noise - above.noise).clamp(min=0) * share
            extra = below.extra_bytes + (above.extra_bytes - below.extra_bytes) * (width - fewest) // (most - fewest)
            found[width] = replace(above, noise=noise, extra_bytes=extra)
    return found


def with_finer_rows(
    captured: Program, trials: LayerTrials, recipe: SettledRecipe, options: Mapping[str, Sequence[Option]]
) -> dict[str, list[Option]]:
    """Add tables of more rows, which functions that are steep between knots may need."""
    if recipe.whole.optimize == "speed":
        return {name: list(few) for name, few in options.items()}
    found: dict[str, list[Option]] = {}
    for name, few in options.items():
        finest = [option for option in few if option.change.get("levels") == _FINEST]
        found[name] = list(few)
        for count in _FINER_ROWS if finest else ():
            known = finest[0]
            one = trials.trial(recipe, name, {**known.change, "levels": count})
            if one is None:
                break
            extra = constant_bytes(captured, name) + one.extra_bytes - known.bytes
            found[name] += [
                Option(
                    {**option.change, "levels": count},
                    option.bytes + extra,
                    one.noise + (option.noise - known.noise).clamp(min=0),
                    one.nanoseconds,
                )
                for option in finest
            ]
    return found


def _functions_of(captured: Program, name: str, layer: LayerRecipe, samples: int) -> list[dict[str, Any]]:
    """List the shares of variance that fewer functions of a layer may lose: of channels, or of inputs looked up jointly.

    The latter are fitted to samples: with 256 of them, digits 64-64-10 kept 25.0 dB on these and
    20.5 on others, with 1,024 25.1 and 23.3.
    """
    if captured.kinds.get(name) is not None or layer.function_error is not None:
        return []
    if not chooses_rows(captured, name):
        return [{"function_error": share} for share in _CHANNEL_SHARES]
    is_free = (
        layer.lookup == "auto" and layer.granularity == "channel" and layer.table_bits == 8 and layer.levels is None
    )
    wide = captured.contraction(captured.layer(name)).products >= _JOINT_FROM and samples >= _JOINT_SAMPLES
    return [{"lookup": "joint", "function_error": share} for share in (_JOINT_SHARES if is_free and wide else ())]
