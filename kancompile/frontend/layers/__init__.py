"""Find KAN layers in the flow and write each as expansions and one linear map."""

from kancompile.frontend.layers.canonical import CanonicalLayer
from kancompile.frontend.layers.chains import find_layers
from kancompile.frontend.layers.identity import uses_of_layers
from kancompile.frontend.layers.probing import TOLERANCE, sizes_of_terms

__all__ = [
    "TOLERANCE",
    "CanonicalLayer",
    "find_layers",
    "sizes_of_terms",
    "uses_of_layers",
]
