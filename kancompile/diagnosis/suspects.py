"""Turn the anatomy of a layer into recipe changes worth trying, with what each is predicted to bring at the output.

Noise of layers adds up, and a layer's noise at the output is taken to scale with the error at the layer's own output: if a
change leaves the share ``f`` of that error, the output's noise becomes ``N - N_layer (1 - f)``. How parts change is known:

* four times as many rows leave 1/16 of the look-up error, since rows are ``step^2 / 12`` wide in error;
* a range that reaches all inputs cuts nothing off, and spreads the same rows over more;
* each further weight bit leaves 1/4 of the rounding error, a method that compensates about a fifth;
* functions that were left out cost at most the share of the variance that the recipe allows;
* 16 bits leave nothing of a layer's noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.cause import BITS, FUNCTIONS, HAND_OVER, LEVELS, METHOD, PRECISION, RANGE, SATURATION, Change
from kancompile.passes import method_named
from kancompile.recipe import LayerRecipe, Recipe
from kancompile.validation import decibel

MOST_ROWS = 4096
MOST_ROWS_CONVOLUTION = 256
_MOST_COLUMNS = {"awq+gptq": 2048, "gptq": 8192}
_COMPENSATED = 0.2
"""Share of the error of nearest rounding that methods with compensation leave: 1/4 to 1/10 on the models measured."""


@dataclass(frozen=True)
class Suspect:
    """A recipe change that may help.

    Attributes:
        kind: of the cause.
        layer: concerned layer.
        change: what to try.
        predicted_noise: noise at the output that is expected then.
    """

    kind: str
    layer: str
    change: Change
    predicted_noise: float

    def predicted_db(self, noise: float) -> float:
        """Gain of the output SQNR that is expected, given the noise now."""
        return decibel(noise, self.predicted_noise)


def suspects(recipe: Recipe, anatomy: Anatomy, noise: float, alone: float, signal: float) -> list[Suspect]:
    """List the changes that concern one layer.

    Args:
        recipe: the recipe now.
        anatomy: of the layer.
        noise: noise at the output with all layers lowered.
        alone: noise at the output with this layer lowered alone.
        signal: power of the output about its mean.
    """
    chosen = recipe.for_layer(anatomy.layer)
    alone = min(alone, noise)
    found: list[Suspect] = []

    def add(kind: str, keys: dict[str, object], **factors: float) -> None:
        left = max(noise - alone * (1 - anatomy.scaled(factors)), 1e-12 * noise)
        found.append(Suspect(kind, anatomy.layer, Change({anatomy.layer: keys}), left))

    wider = _widening(anatomy)
    range_kind = RANGE if anatomy.reads == "real" else HAND_OVER
    if anatomy.outside > 0 and chosen.range != "mse":
        add(range_kind, {"range": "mse"}, outside=0.0, levels=_looked_up(anatomy) if chosen.levels is None else wider)
    elif anatomy.outside > 0:
        add(range_kind, {"range": "minmax"}, outside=0.0, levels=wider)
    most = MOST_ROWS_CONVOLUTION if anatomy.is_convolution else MOST_ROWS
    rows = min(4 * anatomy.rows, most)
    if rows > anatomy.rows and not anatomy.is_joint:
        for candidate in dict.fromkeys((rows, min(16 * anatomy.rows, most))):
            # a range chosen by error cuts off only where rows are few
            kept = (anatomy.rows / candidate) ** 2
            add(LEVELS, {"levels": candidate}, levels=kept, outside=kept if chosen.range == "mse" else 1.0)
    if anatomy.is_convolution and chosen.shared_error > 0:
        left = max(noise - min(alone, chosen.shared_error * signal), 1e-12 * noise)
        found.append(Suspect(FUNCTIONS, anatomy.layer, Change({anatomy.layer: {"function_error": 0.0}}), left))
    if anatomy.is_joint:
        each = Change({anatomy.layer: {"lookup": "each"}})
        found.append(Suspect(FUNCTIONS, anatomy.layer, each, max(noise - alone, 1e-12 * noise)))
    found += _weights(chosen, anatomy, noise, alone)
    wide = Change({anatomy.layer: {"precision": "int16"}})
    return [*found, Suspect(PRECISION, anatomy.layer, wide, max(noise - alone, 1e-12 * noise))]


def _weights(chosen: LayerRecipe, anatomy: Anatomy, noise: float, alone: float) -> list[Suspect]:
    name, bits = anatomy.layer, chosen.weight_bits
    found = []

    def left(factor: float) -> float:
        factors = {"weights": factor} | ({"levels": _looked_up(anatomy)} if chosen.levels is None else {})
        return max(noise - alone * (1 - anatomy.scaled(factors)), 1e-12 * noise)

    if not method_named(chosen.rounding_method).compensates and not (chosen.method == "auto" and bits == 8):
        for method, most in _MOST_COLUMNS.items():
            if anatomy.columns <= most:
                found.append(Suspect(METHOD, name, Change({name: {"method": method}}), left(_COMPENSATED)))
    if bits < 8:
        others = left(0.0)
        # the fewest bits with which this layer's rounding no longer is most of the noise
        enough = next((more for more in range(bits + 1, 8) if left(4.0 ** (bits - more)) <= 1.5 * others), 8)
        for more in dict.fromkeys((enough, 8)):
            change = Change({name: {"weight_bits": more}})
            found.append(Suspect(BITS, name, change, left(4.0 ** (bits - more))))
    if anatomy.pair_cost > 1:
        found.append(Suspect(SATURATION, name, Change(keys={"cpu": "x86-vnni"}), left(1 / anatomy.pair_cost)))
    return found


def _looked_up(anatomy: Anatomy) -> float:
    """Share of the look-up error that is left once rows are chosen by error: a tenth of that of the codes, or less."""
    return min(1.0, 0.1 * anatomy.codes / anatomy.levels) if anatomy.levels > 0 else 1.0


def _widening(anatomy: Anatomy) -> float:
    """By how much the look-up error grows when the same rows cover all inputs."""
    span = anatomy.high - anatomy.low
    whole = max(anatomy.high, anatomy.input_high) - min(anatomy.low, anatomy.input_low)
    return (whole / span) ** 2 if span > 0 else 1.0


def jointly(found: list[Suspect], noise: float) -> list[Suspect]:
    """Join changes of one kind that concern several layers, for where each alone is hidden by the others."""
    joined = []
    for kind in dict.fromkeys(suspect.kind for suspect in found):
        best: dict[str, Suspect] = {}
        for suspect in (suspect for suspect in found if suspect.kind == kind and suspect.change.layers):
            if suspect.layer not in best or suspect.predicted_noise < best[suspect.layer].predicted_noise:
                best[suspect.layer] = suspect
        if len(best) > 1:
            removed = sum(noise - suspect.predicted_noise for suspect in best.values())
            layers = {name: keys for suspect in best.values() for name, keys in suspect.change.layers.items()}
            joined.append(Suspect(kind, "", Change(layers), max(noise - removed, 1e-12 * noise)))
    return joined


def renamed(suspect: Suspect, kind: str) -> Suspect:
    """Return the same change as evidence of another kind of cause."""
    return replace(suspect, kind=kind)
