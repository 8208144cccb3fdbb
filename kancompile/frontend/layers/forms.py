"""The forms that a layer can take, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from kancompile.errors import first_line
from kancompile.frontend.flow import Flow, NotLowerableError, misses_table
from kancompile.frontend.layers.canonical import CanonicalLayer, shipped_bytes
from kancompile.frontend.layers.convolution import canonicalize_convolution
from kancompile.frontend.layers.dense import can_be_per_token, canonicalize
from kancompile.frontend.layers.patches import canonicalize_patches, find_patches
from kancompile.frontend.layers.pixelwise_map import is_over_positions
from kancompile.frontend.layers.probing import confirm
from kancompile.frontend.layers.regions import Region


def best_layer(flow: Flow, candidates: Sequence[Region], name: str) -> CanonicalLayer:
    """Canonicalise every candidate and take the smallest; the refusal of the first one counts if there is none."""
    layers: list[CanonicalLayer] = []
    refusals: list[NotLowerableError] = []
    for region in candidates:
        try:
            layers.append(_canonical_layer(flow, region, name))
        except NotLowerableError as refusal:
            refusals.append(refusal)
        except (IndexError, RuntimeError) as error:
            if not misses_table(error):
                raise
            reason = (
                f"a look-up fails on other inputs than the example ({first_line(error)}); clamp its index to the table"
            )
            refusals.append(NotLowerableError(reason))
    if not layers:
        raise refusals[0]
    return min(layers, key=shipped_bytes)


def _canonical_layer(flow: Flow, region: Region, name: str) -> CanonicalLayer:
    """Canonicalise token by token where that holds, else with every element as an input of its own."""
    if any(is_over_positions(flow, node) for node in region.affine):
        layer = canonicalize_convolution(flow, region, name)
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
    for channels_first in (False, True):
        if not can_be_per_token(flow, region, channels_first):
            continue
        try:
            layer = canonicalize(flow, region, name, per_token=True, channels_first=channels_first)
            confirm(flow, layer)
            return layer
        except NotLowerableError:
            pass  # those dimensions are no tokens; the form below says what is wrong if anything is
    try:
        layer = canonicalize(flow, region, name, per_token=False)
        confirm(flow, layer)
    except NotLowerableError as error:
        raise refusal or error from error
    return layer
