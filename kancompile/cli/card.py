"""``kancompile card``: the model card of a folder of compiled files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.session import show_result
from kancompile.errors import KanCompileError, check_form

CARD = "README.md"
TEXT = """\
examples:
  kancompile card build
  kancompile card build --name 'digits KAN, 8 bits' --base-model me/digits-kan --license apache-2.0 \\
      --task image-classification --dataset digits

Writes DIR/README.md, a model card as the Hugging Face Hub reads it: a YAML header (library_name, base_model_relation, tags,
metrics) and the files, inputs, results, use and recipe, all from the manifests in DIR and from DIR/model.report.json where
compile --report or report wrote one. What nobody said (license, base model, intended use) is left out or marked to be
filled in."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument(
        "folder", metavar="DIR", help="folder that compile wrote, or a part of its files with their manifests"
    )
    parser.add_argument("--name", metavar="TEXT", help="heading of the card (default: the folder's name)")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="the float model on the hub")
    parser.add_argument("--license", metavar="ID", help="license of the model, such as apache-2.0")
    parser.add_argument("--task", metavar="TYPE", help="pipeline tag, such as tabular-classification")
    parser.add_argument(
        "--dataset", metavar="NAME", help="data that the report was measured on; with --task it names the result"
    )
    parser.add_argument("--out", metavar="FILE.md", help="card to write (default DIR/README.md)")
    parser.add_argument("--force", action="store_true", help="replace an existing card")


def run(options: argparse.Namespace) -> int:
    """Write the card of a folder."""
    from kancompile.compiler import check_destinations, write_atomically
    from kancompile.reporting import CardFacts, model_card

    folder = Path(options.folder)
    out = folder / CARD if options.out is None else Path(options.out)
    files = _files(folder)
    check_destinations([out], options.force)
    name = folder.resolve().name if options.name is None else options.name
    facts = CardFacts(name, options.base_model, options.license, options.task, options.dataset)
    report = _report(folder, {file.manifest["model_sha256"] for file in files})
    text = model_card(files, report, facts)
    write_atomically({out: text.encode()}, options.force)
    names = [file.name for file in files]
    found = {"path": str(out), "files": names, "has_report": report is not None}
    hint = (
        ""
        if report is not None
        else "\nno report of these files beside them, so the card has no results: kancompile report writes one"
    )
    show_result(options, found, f"wrote {out} ({len(text.encode()):,} bytes) about {', '.join(names)}{hint}")
    return OK


def _files(folder: Path) -> list[Any]:
    """Find the compiled files of a folder, each with its own manifest.

    Raises:
        KanCompileError: there is none, or a file and its manifest do not belong together.
    """
    from kancompile.compiler import MANIFEST_FORM, MANIFEST_SUFFIX, target_named, why_torn
    from kancompile.reporting import CardFile, read_manifest
    from kancompile.runtimes import read_model

    found = []
    for path in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")) if folder.is_dir() else []:
        who, way_out = f"manifest {str(path)!r}", "compile the model again"
        manifest = read_manifest(path)
        check_form(manifest, {**MANIFEST_FORM, "model_sha256": str, "target": str}, who, way_out)
        stem = path.name.removesuffix(MANIFEST_SUFFIX)
        names = (stem + target_named(manifest["target"]).suffix, stem)
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise KanCompileError(
                f"{who}: found no {' and no '.join(names)} beside it, expected the file; copy the two together"
            )
        content = read_model(file)
        if (why := why_torn(manifest, content)) is not None:
            raise KanCompileError(f"{who} {why}; copy the two together, or compile again")
        found.append(CardFile(file.name, len(content), manifest))
    if not found:
        raise KanCompileError(
            f"card: found no *{MANIFEST_SUFFIX} in {str(folder)!r}, expected a folder that kancompile compile wrote"
        )
    return sorted(found, key=lambda file: (not file.name.endswith(".onnx"), file.name))


def _report(folder: Path, hashes: set[str]) -> dict[str, Any] | None:
    """Read the report of one of the files, ``None`` where there is none of them."""
    from kancompile.reporting import read_manifest

    for path in sorted(folder.glob("*.report.json")):
        found = read_manifest(path)
        if isinstance(found, dict) and found.get("model", {}).get("sha256") in hashes and "summary" in found:
            return found
    return None


COMMAND = Command("card", "write the model card of a folder of compiled files", TEXT, add_options, run)
