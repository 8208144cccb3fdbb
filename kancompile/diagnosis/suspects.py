"""Turn the anatomy of a layer into recipe changes worth trying, with what each is predicted to bring at the output.

Noise of layers adds up, and a layer's noise at the output is taken to scale with the error at the layer's own output: if a
change leaves the share ``f`` of that error, the output's noise becomes ``N - N_layer (1 - f)``. How parts change is known:

* four times as many rows leave 1/16 of the lookup error, since rows are ``step^2 / 12`` wide in error;
* a range that reaches all inputs cuts nothing off, and spreads the same rows over more;
* each further weight bit leaves 1/4 of the rounding error, a method that compensates about a fifth;
* functions that were left out cost at most the share of the variance that the recipe allows;
* 16 bits leave nothing of a layer's noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kancompile.compiler import Rung, rungs
from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.cause import BITS, FUNCTIONS, HAND_OVER, LEVELS, METHOD, PRECISION, RANGE, SATURATION, Change
from kancompile.passes import method_named
from kancompile.recipe import LayerRecipe
from kancompile.validation import decibel

_KINDS = {
    "method": METHOD,
    "range": RANGE,
    "levels": LEVELS,
    "function_error": FUNCTIONS,
    "lookup": FUNCTIONS,
    "weight_bits": BITS,
    "precision": PRECISION,
}
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


def suspects(chosen: LayerRecipe, anatomy: Anatomy, noise: float, alone: float, signal: float) -> list[Suspect]:
    """List the changes that concern one layer.

    Args:
        chosen: the layer's recipe now.
        anatomy: of the layer.
        noise: noise at the output with all layers lowered.
        alone: noise at the output with this layer lowered alone.
        signal: power of the output about its mean.
    """
    alone = min(alone, noise)
    ladder = rungs(chosen, anatomy.columns, anatomy.rows, anatomy.most_rows, anatomy.is_convolution, anatomy.is_joint)
    methods = [rung for rung in ladder if rung.key == "method"]
    found: list[Suspect] = []
    # of methods, which are all predicted the same, the most thorough one wins ties
    for rung in (*reversed(methods), *(rung for rung in ladder if rung.key != "method")):
        gone = _removed(rung, chosen, anatomy, alone, signal)
        if gone is not None:
            kind = HAND_OVER if rung.key == "range" and anatomy.reads != "real" else _KINDS[rung.key]
            change = Change({anatomy.layer: rung.change})
            found.append(Suspect(kind, anatomy.layer, change, _left(noise, gone)))
    bits = [suspect for suspect in found if suspect.kind == BITS]
    if bits:
        others = _left(noise, alone * (1 - anatomy.scaled(_rounded(chosen, anatomy, 0.0))))
        # the fewest bits with which this layer's rounding no longer is most of the noise, and the most
        enough = next((suspect for suspect in bits if suspect.predicted_noise <= 1.5 * others), bits[-1])
        found = [suspect for suspect in found if suspect.kind != BITS or suspect in (enough, bits[-1])]
    if anatomy.pair_cost > 1:  # no rung of a layer: a key of the whole recipe
        gone = alone * (1 - anatomy.scaled(_rounded(chosen, anatomy, 1 / anatomy.pair_cost)))
        found.append(Suspect(SATURATION, anatomy.layer, Change(keys={"cpu": "x86-vnni"}), _left(noise, gone)))
    return found


def _removed(rung: Rung, chosen: LayerRecipe, anatomy: Anatomy, alone: float, signal: float) -> float | None:
    """Predict how much noise a change removes from the output, ``None`` where the anatomy does not tell."""
    match rung.key, rung.value:
        case "method", _ if not method_named(chosen.rounding_method).compensates:
            factors = _rounded(chosen, anatomy, _COMPENSATED)
        case "range", "mse" if anatomy.outside > 0:
            levels = _looked_up(anatomy) if chosen.levels is None else _widening(anatomy)
            factors = {"outside": 0.0, "levels": levels}
        case "range", "minmax" if anatomy.outside > 0 and chosen.range == "mse":
            factors = {"outside": 0.0, "levels": _widening(anatomy)}
        case "levels", rows:
            kept = (anatomy.rows / rows) ** 2
            # a range chosen by error cuts off only where rows are few
            factors = {"levels": kept, "outside": kept if chosen.range == "mse" else 1.0}
        case "lookup", "each":
            return alone
        case "function_error", share if anatomy.is_joint:
            return alone * (1 - float(share) / chosen.joint_error)
        case "function_error", share:
            return min(alone, (chosen.shared_error - float(share)) * signal)
        case "weight_bits", bits:
            factors = _rounded(chosen, anatomy, 4.0 ** (chosen.bits - bits))
        case "precision", "int16":
            return alone
        case _:
            return None
    return alone * (1 - anatomy.scaled(factors))


def _rounded(chosen: LayerRecipe, anatomy: Anatomy, weights: float) -> dict[str, float]:
    """Give the shares of parts that are left where rounding leaves so much; rows not given are then chosen anew."""
    chosen_anew = chosen.levels is None and not anatomy.is_joint
    return {"weights": weights} | ({"levels": _looked_up(anatomy)} if chosen_anew else {})


def _left(noise: float, removed: float) -> float:
    return max(noise - removed, 1e-12 * noise)


def _looked_up(anatomy: Anatomy) -> float:
    """Share of the lookup error that is left once rows are chosen by error: a tenth of that of the codes, or less."""
    return min(1.0, 0.1 * anatomy.codes / anatomy.levels) if anatomy.levels > 0 else 1.0


def _widening(anatomy: Anatomy) -> float:
    """By how much the lookup error grows when the same rows cover all inputs."""
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
            joined.append(Suspect(kind, "", Change(layers), _left(noise, removed)))
    return joined


def renamed(suspect: Suspect, kind: str) -> Suspect:
    """Return the same change as evidence of another kind of cause."""
    return replace(suspect, kind=kind)
