"""Edge functions of a layer: what each receives, its curves in float and as compiled, and their drawing."""

from kancompile.validation.edge_functions.curves import (
    Edge,
    EdgeName,
    edge_of,
    evaluate_edges,
    important_edges,
    parse_edge,
)
from kancompile.validation.edge_functions.drawing import PAPER, Palette, check_matplotlib, draw_edge, plot
from kancompile.validation.edge_functions.observation import Observation, Outside, observe

__all__ = [
    "PAPER",
    "Edge",
    "EdgeName",
    "Observation",
    "Outside",
    "Palette",
    "check_matplotlib",
    "draw_edge",
    "edge_of",
    "evaluate_edges",
    "important_edges",
    "observe",
    "parse_edge",
    "plot",
]
