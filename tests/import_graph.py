"""The import graph of the package: what stands where, and which way imports go.

A room is an entry of ``kancompile/``, a file or a folder; an arrow is an import from one room in another, anywhere in a
file, inside functions and for type checking included. ``python -m tests.import_graph`` prints the counts, of another checkout
with its path.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Import:
    """``from module import name`` in a file; ``name`` is empty for ``import module``."""

    file: str
    module: str
    name: str


@dataclass(frozen=True)
class ImportGraph:
    """All imports of a package from itself.

    Attributes:
        root: folder that holds the package.
        package: its name.
    """

    root: Path
    package: str = "kancompile"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every module by its dotted name; a folder is the module of its ``__init__``."""
        paths = sorted((self.root / self.package).rglob("*.py"))
        return {dotted(path.relative_to(self.root)): path for path in paths}

    @cached_property
    def folders(self) -> frozenset[str]:
        """The modules that are folders, the package itself left out."""
        found = {module for module, path in self.files.items() if path.name == "__init__.py"}
        return frozenset(found - {self.package})

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import of the package from itself."""
        return tuple(found for module, path in self.files.items() for found in self.imports_of(module, path))

    def imports_of(self, module: str, path: Path) -> list[Import]:
        """List what a file imports from the package."""
        found = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [Import(module, alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found += [Import(module, node.module or "", alias.name) for alias in node.names]
        return [entry for entry in found if entry.module.split(".")[0] == self.package]

    def file_of(self, entry: Import) -> str:
        """Name the module that an import runs: a submodule where the name is one, else the module named."""
        submodule = f"{entry.module}.{entry.name}"
        is_module = submodule in self.files and entry.name not in names_in(self.files[entry.module])
        return submodule if is_module else entry.module

    def room(self, module: str) -> str:
        """Name the entry of the package that a module stands in, empty for the package itself."""
        return module.split(".")[1] if "." in module else ""

    @property
    def rooms(self) -> list[str]:
        """The entries that hold code, ``__init__`` and ``__main__`` left out."""
        return sorted({self.room(module) for module in self.files} - {"", "__main__"})

    @property
    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms of which the first imports from the second."""
        pairs = {(self.room(entry.file), self.room(self.file_of(entry))) for entry in self.imports}
        return {(one, other) for one, other in pairs if one != other and one and other and one != "__main__"}

    @property
    def circles(self) -> list[set[str]]:
        """Groups of files that import each other in a circle."""
        graph: dict[str, set[str]] = {module: set() for module in self.files}
        for entry in self.imports:
            graph[entry.file].add(self.file_of(entry))
        return [group for group in strongly_connected(graph) if len(group) > 1]

    @property
    def floors(self) -> int:
        """Rooms on the longest way down, circles counted as one room."""
        groups = strongly_connected({room: {b for a, b in self.arrows if a == room} for room in self.rooms})
        below: dict[str, int] = {}
        for group in groups:  # from the bottom up
            height = 1 + max((below[b] for a, b in self.arrows if a in group and b not in group), default=0)
            below.update(dict.fromkeys(group, height))
        return max(below.values())

    def door(self, entry: Import) -> str | None:
        """Name the outermost folder that an import reaches into from outside, ``None`` where it stays inside."""
        parts = self.file_of(entry).split(".")
        for length in range(2, len(parts) + 1):
            folder = ".".join(parts[:length])
            if folder in self.folders and not f"{entry.file}.".startswith(f"{folder}."):
                return folder
        return None


def dotted(path: Path) -> str:
    """Name the module of a file: ``a/b/__init__.py`` -> ``a.b``."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def names_in(path: Path) -> set[str]:
    """List the names that a file defines or imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def offered(path: Path) -> list[str]:
    """Read the ``__all__`` of a folder's door."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


def strongly_connected(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Group the nodes that reach each other (Tarjan, 1972), what is reached before what reaches it."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            groups.append(set(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in number:
            visit(node)
    return groups


def counts(graph: ImportGraph) -> str:
    """Say in one line how the house stands."""
    return (
        f"{len(graph.rooms)} rooms on {graph.floors} floors, {len(graph.arrows)} arrows between rooms, "
        f"{len(graph.circles)} circles"
    )


if __name__ == "__main__":
    print(counts(ImportGraph(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)))
