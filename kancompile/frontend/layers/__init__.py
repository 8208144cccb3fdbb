"""Find KAN layers in the flow and write each as expansions and one linear map."""

from kancompile.frontend.layers.canonical import CanonicalLayer, layer_name
from kancompile.frontend.layers.forms import best_layer
from kancompile.frontend.layers.identity import uses_of_layers
from kancompile.frontend.layers.probing import TOLERANCE
from kancompile.frontend.layers.regions import find_regions

__all__ = [
    "TOLERANCE",
    "CanonicalLayer",
    "best_layer",
    "find_regions",
    "layer_name",
    "uses_of_layers",
]
