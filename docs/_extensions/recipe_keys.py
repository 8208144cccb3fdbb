"""The directive ``recipe-keys``: a table of every recipe key, made from the recipe itself when the pages are built."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from kancompile.recipe import LayerRecipe, describe_keys

HEAD = ("key", "default", "values", "meaning")


class RecipeKeys(Directive):
    """List the keys that may differ from layer to layer (``layer``), or those of the whole model (``model``)."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        of_layers = set(LayerRecipe.__dataclass_fields__)
        wanted = {"layer": True, "model": False}[self.arguments[0]]
        rows = [row for row in describe_keys() if (row[0] in of_layers) == wanted]
        return [_table([(key, "unset" if default == "null" else default, *rest) for key, default, *rest in rows])]


def _table(rows: list[tuple[str, ...]]) -> nodes.table:
    group = nodes.tgroup(cols=len(HEAD))
    for width in (18, 12, 30, 40):
        group += nodes.colspec(colwidth=width)
    head, body = nodes.thead(), nodes.tbody()
    head += _row([nodes.paragraph("", name) for name in HEAD])
    for key, default, values, meaning in rows:
        first, second = nodes.paragraph(), nodes.paragraph()
        first += nodes.literal("", key)
        second += nodes.literal("", default)
        body += _row([first, second, nodes.paragraph("", values), nodes.paragraph("", meaning)])
    group += [head, body]
    table = nodes.table()
    table += group
    return table


def _row(cells: list[nodes.paragraph]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        row += nodes.entry("", cell)
    return row


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("recipe-keys", RecipeKeys)
    return {"parallel_read_safe": True}
