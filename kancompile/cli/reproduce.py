"""``kancompile reproduce``: compile again what a manifest names, and compare the bytes."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kancompile.cli.command import Command
from kancompile.cli.compile import NO_DATA
from kancompile.cli.exit_codes import OK, THRESHOLD_MISSED
from kancompile.cli.origin import HASHES, ORIGIN_FORM, hashes, options_of
from kancompile.cli.session import load_float_model, opened_data, show_result, working
from kancompile.errors import KanCompileError, check_form, read_bytes
from kancompile.progress import say
from kancompile.recipe import read_recipe

if TYPE_CHECKING:
    from kancompile.compiler import CompiledModel

_SHOWN, _MOST_BYTES = 12, 1 << 31
TEXT = """\
examples:
  kancompile reproduce build/model.manifest.json --trust-manifest
  kancompile reproduce build/model.ort.manifest.json --trust-manifest --json

Compiles again from what the manifest names (model, checkpoint, calibration data, recipe, seed; paths as they were given
to kancompile compile, so run it in the same folder), writes nothing, and compares every byte with the file beside the
manifest; where that is missing, with the hash in the manifest. Says which packages and inputs have changed and where the
files begin to differ."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("manifest", metavar="MODEL.manifest.json", help="manifest that kancompile compile wrote")
    parser.add_argument(
        "--trust-manifest",
        action="store_true",
        help="run the code that the manifest names (MODEL, loader, transform), so only for manifests of known origin",
    )


def run(options: argparse.Namespace) -> int:
    """Compile again and compare."""
    from kancompile.compiler import changed_facts, changed_versions, first_difference

    path = Path(options.manifest)
    manifest = _read(path)
    made_from = manifest["made_from"]
    if not options.trust_manifest:
        raise KanCompileError(
            f"manifest {str(path)!r}: compiling again runs the code of {made_from['model']!r} with the arguments "
            f"{made_from['factory_arg']!r} and reads {made_from['data']!r}; where you trust it, add --trust-manifest"
        )
    packages = changed_versions(manifest)
    with working(options):
        for text in packages:
            say(f"note: {text}")
        changed, again = _compiled(manifest, options)
    file = _file_of(path, manifest)
    different = differences(file, manifest, again)
    if file is not None and not different:
        different += _companions(file, again)
    where = None
    if different and file is not None:
        where = first_difference(_content(file), again.model_bytes, file.suffix == ".onnx")
    facts = changed_facts(manifest, again.manifest, ("manifest_sha256", "made_from", "allocation"))
    report = {
        "manifest": str(path), "file": None if file is None else str(file), "reproduced": not different,
        "model_sha256": manifest["model_sha256"], "model_sha256_now": again.manifest["model_sha256"], "differences": different,
        "first_difference": where, "changed_inputs": changed, "changed_versions": packages, "changed_facts": facts,
    }  # fmt: skip
    show_result(options, report, _text(report))
    return THRESHOLD_MISSED if different else OK


def _read(path: Path) -> dict[str, Any]:
    from kancompile.compiler import MANIFEST_FORM, own_hash_fits
    from kancompile.reporting import read_manifest

    manifest: dict[str, Any] = read_manifest(path)
    who, way_out = f"manifest {str(path)!r}", "give one that kancompile compile wrote, or compile the model again"
    check_form(manifest, {**MANIFEST_FORM, "model_sha256": str}, who, way_out)
    if not own_hash_fits(manifest):
        raise KanCompileError(f"{who}: it was changed after it was written, expected it as it was; {way_out}")
    if "made_from" not in manifest:
        raise KanCompileError(
            f"{who}: found nothing about what the file was made from, expected a manifest that kancompile compile wrote: one "
            "that Python's compile().save() wrote names no model and no data; run the same script again and compare the files"
        )
    check_form(manifest["made_from"], ORIGIN_FORM, f"{who}, made_from", way_out)
    return manifest


def _compiled(manifest: Mapping[str, Any], command: argparse.Namespace) -> tuple[list[str], CompiledModel]:
    from kancompile.compiler import compile as compile_model
    from kancompile.compiler import sampled_inputs
    from kancompile.data import model_inputs, read_divided

    made_from, seed = manifest["made_from"], manifest["seed"]
    options = options_of(made_from, seed, command)
    recipe = read_recipe(made_from["recipe"])
    model = load_float_model(options)
    now = hashes(options, model)
    changed = [key for key in HASHES if now[key] != made_from[key]]
    for key in changed:
        say(f"note: {HASHES[key]} changed: SHA-256 {made_from[key]} then, {now[key]} now")
    inputs = model_inputs(model)
    data = sampled_inputs(model, seed) if options.data == NO_DATA else opened_data(options)
    divided = read_divided(data, recipe.calibration_samples, options.held_out, seed, key=options.data_key, model=inputs)
    (first, *further), target = made_from["targets"], manifest["target"]
    again = compile_model(
        model,
        divided.fitting,
        target=first,
        also_for=further,
        recipe=recipe,
        seed=seed,
        device=options.device,
        dynamic=options.dynamic,
    )
    again = again if target == first else again.for_target(target)
    if again.manifest["calibration"]["sha256"] != manifest["calibration"]["sha256"] and "data_sha256" not in changed:
        changed.append("calibration")
        say("note: the calibration samples are not those of the first compilation")
    return changed, again


def _file_of(path: Path, manifest: Mapping[str, Any]) -> Path | None:
    """Find the file beside its manifest: ``model.manifest.json`` is that of ``model.onnx``, or of ``model.c`` and the like."""
    from kancompile.compiler import MANIFEST_SUFFIX, target_named

    stem = path.name.removesuffix(MANIFEST_SUFFIX)
    beside = [path.with_name(name) for name in (stem + target_named(manifest["target"]).suffix, stem)]
    return next((file for file in beside if file.is_file()), None)


def _content(file: Path) -> bytes:
    return read_bytes(file, f"file {str(file)!r}", "give the file that the manifest belongs to", _MOST_BYTES)


def differences(file: Path | None, manifest: Mapping[str, Any], again: CompiledModel) -> list[str]:
    """Say what is not as the manifest says: the file compiled again, and the one beside the manifest."""
    found = []
    if again.manifest["model_sha256"] != manifest["model_sha256"]:
        found.append(f"the bytes are others than the manifest names (SHA-256 {again.manifest['model_sha256']})")
    if file is not None and hashlib.sha256(_content(file)).hexdigest() != manifest["model_sha256"]:
        found.append(f"{file.name} beside the manifest is not the file that it names")
    return found


def _companions(file: Path, again: CompiledModel) -> list[str]:
    paths = {file.with_name(file.stem + suffix): content for suffix, content in again.companions.items()}
    return [
        f"{path.name} differs or is missing"
        for path, content in paths.items()
        if not path.is_file() or _content(path) != content
    ]


def _text(report: Mapping[str, Any]) -> str:
    beside = "the file beside it" if report["file"] is None else report["file"]
    lines = [f"reproduced: {beside}, every byte (SHA-256 {report['model_sha256']})"] if report["reproduced"] else []
    lines += [f"not reproduced: {text}" for text in report["differences"]]
    if report["first_difference"] is not None:
        lines.append(f"files differ from {report['first_difference']}")
    lines += [f"changed: {HASHES.get(key, 'the samples that calibrate')}" for key in report["changed_inputs"]]
    lines += [f"changed: {text}" for text in report["changed_versions"]]
    if report["changed_facts"]:
        more = len(report["changed_facts"]) - _SHOWN
        names = ", ".join(report["changed_facts"][:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"the manifest would say otherwise: {names}")
    if report["file"] is None:
        lines.append("no file stands beside the manifest; compared by its hash")
    return "\n".join(lines)


COMMAND = Command("reproduce", "compile again what a manifest names, and compare the bytes", TEXT, add_options, run)
