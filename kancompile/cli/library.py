"""``kancompile library``: an Arduino library or a CMake project of a model in C."""

from __future__ import annotations

import argparse
from pathlib import Path

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.session import show_result
from kancompile.errors import KanCompileError

TEXT = """\
examples:
  kancompile compile models.py:make_kan --checkpoint kan.pt --calibration train.npz --target c99 --out build
  kancompile library build/model.c --layout arduino --name digits_kan --out ~/Arduino/libraries/digits_kan
  kancompile library build/model.c --layout cmake --name digits_kan --out digits_kan

Copies model.c and model.h into a folder as build systems expect it: an Arduino library with library.properties and an example
sketch, or a CMake project with a library target and a program that maps samples from standard input. The files themselves stay as
compile wrote them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("file", metavar="MODEL.c", help="file of the target c99, its .h and its manifest beside it")
    parser.add_argument("--layout", required=True, choices=("arduino", "cmake"), help="which build system")
    parser.add_argument("--name", required=True, metavar="NAME", help="name of the library, an identifier")
    parser.add_argument(
        "--library-version", default="1.0.0", metavar="N.N.N", help="version of the library (default 1.0.0)"
    )
    parser.add_argument(
        "--author", default="unknown", metavar="TEXT", help="author and maintainer in library.properties"
    )
    parser.add_argument("--url", default="", metavar="URL", help="page of the library in library.properties")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the library")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(options: argparse.Namespace) -> int:
    """Write the library."""
    from kancompile.compiler import check_destinations, write_atomically
    from kancompile.errors import read_bytes
    from kancompile.reporting import describe_manifest
    from kancompile.targets import LibraryFacts, library_files

    path = Path(options.file)
    facts = LibraryFacts(options.name, options.library_version, options.author, options.url)
    target = describe_manifest(path)["metadata"].get("target")  # a torn pair is refused there
    if target != "c99":
        raise KanCompileError(f"library: found {str(path)!r} of the target {target!r}, expected a .c file of c99")
    source, header = (
        read_bytes(file, f"file {str(file)!r}", "copy model.c and model.h together", 1 << 31)
        for file in (path, path.with_suffix(".h"))
    )
    folder = Path(options.out)
    files = {folder / name: content for name, content in library_files(source, header, facts, options.layout).items()}
    check_destinations(files, options.force)
    write_atomically(files, options.force)
    report = {"path": str(folder), "files": {str(file): len(content) for file, content in files.items()}}
    show_result(options, report, "\n".join(f"wrote {file} ({len(content):,} bytes)" for file, content in files.items()))
    return OK


COMMAND = Command("library", "make an Arduino library or a CMake project of a model in C", TEXT, add_options, run)
