"""Draw what a report says; nothing is measured here."""

from kancompile.reporting.render.html import render
from kancompile.reporting.render.model_card import CardFacts, CardFile, model_card
from kancompile.reporting.render.node_data import node_data
from kancompile.reporting.render.paper_figures import (
    FORMATS,
    comparison_figure,
    figure_names,
    report_figures,
)
from kancompile.reporting.render.terminal import compile_summary
from kancompile.reporting.render.text_plot import text_plot

__all__ = [
    "FORMATS",
    "CardFacts",
    "CardFile",
    "comparison_figure",
    "compile_summary",
    "figure_names",
    "model_card",
    "node_data",
    "render",
    "report_figures",
    "text_plot",
]
