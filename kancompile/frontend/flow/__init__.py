"""Follow by element ids what every element of a traced network depends on."""

from kancompile.frontend.flow.axes import Axes, ReorderedSelection
from kancompile.frontend.flow.batch_dependence import refuse_batch_dependence, run
from kancompile.frontend.flow.batch_layout import BatchLayout, NotLowerableError, layout_of
from kancompile.frontend.flow.flow import Flow, analyse, live_nodes
from kancompile.frontend.flow.images import emit_image, image_order, image_shape, whole_image
from kancompile.frontend.flow.origins import Cut, follow, locate
from kancompile.frontend.flow.subgraph import ChannelSelection, GraphCopier, Selection, cut_out, is_fixed, largest_row
from kancompile.frontend.flow.table_rules import misses_table
from kancompile.frontend.flow.verdicts import Track, operator_name

__all__ = [
    "Axes",
    "BatchLayout",
    "ChannelSelection",
    "Cut",
    "Flow",
    "GraphCopier",
    "NotLowerableError",
    "ReorderedSelection",
    "Selection",
    "Track",
    "analyse",
    "cut_out",
    "emit_image",
    "follow",
    "image_order",
    "image_shape",
    "is_fixed",
    "largest_row",
    "layout_of",
    "live_nodes",
    "locate",
    "misses_table",
    "operator_name",
    "refuse_batch_dependence",
    "run",
    "whole_image",
]
