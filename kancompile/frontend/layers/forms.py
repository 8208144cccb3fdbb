"""The forms that a layer can take, in the order in which they are tried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kancompile.errors import first_line
from kancompile.frontend.flow import Flow, NotLowerableError, misses_table
from kancompile.frontend.layers.canonical import CanonicalLayer, shipped_bytes
from kancompile.frontend.layers.convolution import canonicalize_convolution
from kancompile.frontend.layers.dense import canonicalize, located
from kancompile.frontend.layers.patches import canonicalize_patches, find_patches
from kancompile.frontend.layers.pixelwise_map import is_over_positions
from kancompile.frontend.layers.probing import confirm
from kancompile.frontend.layers.recognition import PlainLayerError
from kancompile.frontend.layers.regions import Region, origin_of_target, without_final_movement
from kancompile.frontend.layers.token_axes import TokenAxes, find_tokens


def best_layer(flow: Flow, candidates: Sequence[Region], name: str, largest: int) -> CanonicalLayer:
    """Canonicalise every candidate and take the smallest; the refusal of the first one counts if there is none.

    Args:
        flow: analysis of the network.
        candidates: the regions to choose from.
        name: layer name.
        largest: most weights that are written out.

    Raises:
        NotLowerableError: there is none.
    """
    layers: list[CanonicalLayer] = []
    refusals: list[NotLowerableError] = []
    for region in candidates:
        try:
            layers.append(_canonical_layer(flow, region, name, largest))
        except NotLowerableError as refusal:
            refusals.append(refusal)
        except (IndexError, RuntimeError) as error:
            if not misses_table(error):
                raise
            reason = (
                f"a lookup fails on other inputs than the example ({first_line(error)}); clamp its index to the table"
            )
            refusals.append(NotLowerableError(reason))
    if not layers:
        raise refusals[0]
    return min(layers, key=shipped_bytes)


def _canonical_layer(flow: Flow, region: Region, name: str, largest: int) -> CanonicalLayer:
    """Canonicalise token by token where that holds, else with every element as an input of its own."""
    if any(is_over_positions(flow, node) for node in region.affine):
        layer = canonicalize_convolution(flow, region, name, largest)
        confirm(flow, layer)
        return layer
    refusal: NotLowerableError | None = None
    try:
        patches = find_patches(flow, region)
        if patches is not None:
            layer = canonicalize_patches(flow, region, name, patches)
            confirm(flow, layer)
            return layer
    except NotLowerableError as error:
        refusal = error  # a dense matrix may hold it, if the image is small
    ways = located(flow, region)
    parts = dict.fromkeys((region, without_final_movement(flow, region)))
    for part, cuts in itertools.product(parts, ways):
        try:
            tokens = find_tokens(flow, part, cuts)
            if tokens is not None and (part is not region or len(parts) == 1 or _keeps_features(flow, part, tokens)):
                layer = canonicalize(flow, part, name, cuts, tokens, largest)
                confirm(flow, layer)
                return layer
        except PlainLayerError:
            raise
        except NotLowerableError:
            pass  # tokens have functions of their own; the form below says what is wrong if anything is
    try:
        layer = canonicalize(flow, region, name, ways[0], None, largest)
        confirm(flow, layer)
    except NotLowerableError as error:
        raise refusal or error from error
    return layer


def _keeps_features(flow: Flow, region: Region, tokens: TokenAxes) -> bool:
    """Whether final movements leave the outputs of a token in order.

    Else these stay behind the layer, as the next one may read what is moved.
    """
    origin = origin_of_target(flow, region)
    outputs = tokens.target(origin, (tokens.tokens, len(origin) // tokens.tokens))[0]
    return bool((outputs.diff(dim=1) > 0).all())
