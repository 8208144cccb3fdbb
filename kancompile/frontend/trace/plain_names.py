"""Give parameters names that Python code can hold, where the user's names are keywords, or have quotes or line breaks in them.

PyTorch writes the paths of parameters into source code when it takes an exported program apart: ``self.class.weight`` is a syntax
error, and a quotation mark ends a text early. Layers keep the user's names, which stand beside the graph.
"""

from __future__ import annotations

import keyword

from torch.export import ExportedProgram

from kancompile.data import is_utf8
from kancompile.errors import KanCompileError, shown


def give_plain_names(exported: ExportedProgram, is_own: bool) -> None:
    """Rename what is called by a name that cannot be written as Python, in place.

    Args:
        exported: a program.
        is_own: whether it may be changed, which the user's may not.

    Raises:
        KanCompileError: such a name in a user's program, or one that no file can hold, as it is no text.
    """
    signature = exported.graph_signature
    specs = [*signature.input_specs, *signature.output_specs]
    named = {spec.target for spec in specs if spec.target is not None}
    plain = {name: f"renamed_{number}" for number, name in enumerate(sorted(named)) if not _is_plain(name)}
    if not plain:
        return
    unusable = [name for name in plain if not is_own or not is_utf8(name)]
    if unusable:
        raise KanCompileError(
            f"model: found a parameter or buffer called {shown(unusable[0])}, expected names that "
            + (
                "UTF-8 can hold; rename the module"
                if is_own
                else "Python code can hold; compile the module, not its export"
            )
        )
    for spec in specs:
        spec.target = plain.get(spec.target, spec.target) if spec.target is not None else None
    for held in (exported.state_dict, exported.constants):
        renamed = {plain.get(name, name): value for name, value in held.items()}
        held.clear()
        held.update(renamed)


def _is_plain(name: str) -> bool:
    return all(
        not keyword.iskeyword(part) if part.isidentifier() else part.isprintable() and not set(part) & set('"\\')
        for part in name.split(".")
    )
