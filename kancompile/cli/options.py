"""Groups of options that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from kancompile.errors import KanCompileError, parse_literal
from kancompile.recipe import (
    Recipe,
    describe_keys,
)


def add_model(parser: argparse.ArgumentParser, name: str, positional: bool = False, required: bool = True) -> None:
    """Name a float model: where it comes from, its weights, and the arguments of its factory."""
    text = (
        "float model: PACKAGE.MODULE:FACTORY, path/to/file.py:FACTORY, a .pt2 file, or pykan for what pykan's saveckpt wrote, "
        "which --checkpoint names"
    )
    if positional:
        parser.add_argument(name, metavar="MODEL", help=text)
    else:
        parser.add_argument(name, dest="model", metavar="MODEL", required=required, help=text)
    parser.add_argument("--checkpoint", metavar="FILE", help="state dict: .safetensors, torch.save file or .npz")
    parser.add_argument(
        "--checkpoint-key",
        metavar="NAME",
        help="entry of the checkpoint that holds the weights, such as ema (default: state_dict, model, net ...)",
    )
    parser.add_argument(
        "--factory-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of FACTORY; may be repeated"
    )
    parser.add_argument(
        "--trust-model",
        action="store_true",
        help="open a .pt2 file as MODEL: loading one can run any code that it holds, so only for files of known origin",
    )


def add_data(parser: argparse.ArgumentParser, name: str, what: str, required: bool = True, dest: str = "data") -> None:
    """Name samples: a file, a folder of images or a loader; see :func:`kancompile.data.data_sources.open_data`."""
    parser.add_argument(
        f"--{name}",
        dest=dest,
        required=required,
        metavar="DATA",
        help=f"{what}: .npz (x, and labels y), .npy, .csv, a folder of images, or PACKAGE.MODULE:LOADER",
    )
    parser.add_argument(
        f"--{name}-key", dest=f"{dest}_key", metavar="NAME", help="array in the .npz that holds the inputs (default x)"
    )
    if dest == "data":
        parser.add_argument(
            "--transform",
            metavar="TRANSFORM",
            help="PACKAGE.MODULE:TRANSFORM or file.py:TRANSFORM, which prepares an image of the folder as in training",
        )
        parser.add_argument(
            "--target-column",
            action="append",
            default=[],
            metavar="NAME",
            help="column of a .csv file that is the label, by name or number; may be repeated",
        )
        parser.set_defaults(data_name=f"--{name}")


def add_held_out(parser: argparse.ArgumentParser, zero: str = "use all for both") -> None:
    """Set the share of the calibration data that is kept to measure the result with, and say what 0 means."""
    parser.add_argument(
        "--held-out",
        type=fraction,
        default=0.2,
        metavar="SHARE",
        help=f"share of the calibration data kept to measure the result with (default 0.2; 0: {zero})",
    )


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--device``; ``what`` says what is done there."""
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help=f"{what} (default cpu; cuda is experimental)"
    )


def add_diagnosis(parser: argparse.ArgumentParser) -> None:
    """Say what is diagnosed or tuned, and with which data and recipe."""
    add_model(parser, "model", positional=True)
    add_data(parser, "calibration", "inputs scaled as in training", dest="calibration")
    add_data(parser, "data", "samples to judge with, labels if there are any", required=False)
    add_held_out(parser, zero="only with --data")
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice (default 0)")
    add_device(parser, "where rounding computes")
    add_recipe(parser)


def add_diagnose(parser: argparse.ArgumentParser) -> None:
    """Ask for a diagnosis in a report."""
    parser.add_argument(
        "--diagnose", action="store_true", help="also say in the report what loses accuracy, and why; takes time"
    )


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Set what a result must reach."""
    parser.add_argument(
        "--min-sqnr",
        type=float,
        metavar="DB",
        help="least SQNR of every output in dB about its mean (unset: 12, below which an output counts as ruined)",
    )
    add_max_drop(parser)


def add_max_drop(parser: argparse.ArgumentParser) -> None:
    """Set how much accuracy may be lost."""
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="largest loss allowed, in points of accuracy or hundredths of R2",
    )


def add_classifier(parser: argparse.ArgumentParser) -> None:
    """Say that the largest output is a decision where no labels do."""
    parser.add_argument(
        "--classifier",
        action="store_true",
        default=None,
        help="the largest output is a class: give top-1 agreement without labels, too",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Choose a recipe file, and every key of a recipe by an option."""
    group = parser.add_argument_group("recipe", "choices of the compilation; options win over the file")
    group.add_argument("--recipe", metavar="FILE", help=".toml or .json file of the keys below")
    choices = {key.name: key.metadata["choices"] for key in fields(Recipe) if "choices" in key.metadata}
    read = {key.name for key in fields(Recipe) if "read" in key.metadata}
    named = {key.name: key.metadata["names"] for key in fields(Recipe) if "names" in key.metadata}
    for key, default, allowed, meaning in describe_keys():
        option = f"--{key.replace('_', '-')}"
        shown = "" if default == "null" else f" (default {default.strip(chr(34))})"
        if key in choices:
            group.add_argument(option, choices=choices[key], help=f"{meaning}{shown}")
        elif key in read:
            group.add_argument(option, metavar="NAME|FILE", help=f"{meaning}: {allowed}{shown}")
        else:
            read_value = number_or(named[key]) if key in named else number
            group.add_argument(
                option, type=read_value, metavar="N", help=f"{meaning}: {allowed}{shown}".replace("%", "%%")
            )
    group.add_argument(
        "--layer",
        action="append",
        nargs="+",
        default=[],
        metavar=("PATTERN", "KEY=VALUE"),
        help="override keys for layers, such as --layer 'layers.*' weight_bits=4; may be repeated, the last one wins",
    )


def recipe_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the recipe keys that were given as options.

    Raises:
        KanCompileError: an override without ``=``.
    """
    given = {key: getattr(options, key) for key, *_ in describe_keys() if getattr(options, key) is not None}
    layers = []
    for pattern, *items in options.layer:
        overrides: dict[str, Any] = {}
        for item in items:
            key, equals, text = item.partition("=")
            if not equals:
                raise KanCompileError(f"--layer {pattern!r}: found {item!r}, expected KEY=VALUE such as weight_bits=4")
            try:
                overrides[key.replace("-", "_")] = parse_literal(text)
            except ValueError:
                overrides[key.replace("-", "_")] = text
        layers.append((pattern, overrides))
    return given | ({"layers": layers} if layers else {})


def number(text: str) -> int | float:
    """Read an integer where it is one, else a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def number_or(names: Sequence[str]) -> Callable[[str], int | float | str]:
    """Return what reads a number or one of some names."""

    def value(text: str) -> int | float | str:
        return text if text in names else number(text)

    value.__name__ = "number"  # argparse names it
    return value


def seed(text: str) -> int:
    """Read what a random generator can start from."""
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed, expected an integer of 64 bits")
    return value


def count(text: str) -> int:
    """Read 0, 1, 2 ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no count, expected 0, 1, 2 ...")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Read counts that commas separate."""
    return tuple(count(part.strip()) for part in text.split(","))


def fraction(text: str) -> float:
    """Read a share from 0 up to, not including, 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, expected 0 up to, not including, 1")
    return value
