"""``kancompile profile``: measure what operators cost on this machine."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.options import count
from kancompile.cli.session import show_result, working
from kancompile.errors import KanCompileError
from kancompile.recipe import DEFAULT_PROFILE, PROFILES, CostProfile, package_profile, read_profile

TEXT = f"""\
examples:
  kancompile profile --out laptop.toml
  kancompile compile models.py:make_kan --checkpoint kan.pt --calibration train.npz --profile laptop.toml --out build

Runs small models of the operators of compiled files, interleaved, in one thread, for about half a minute, and writes what each
kind of work takes. compile --profile chooses the faster form of a layer by it; without one it takes {DEFAULT_PROFILE}, so that
the same input gives the same file everywhere. The package holds {", ".join(PROFILES)}. Close other programs first."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("--out", required=True, metavar="FILE.toml", help="profile to write")
    parser.add_argument("--name", help="how manifests call it (default: the name of the file)")
    parser.add_argument("--repeats", type=count, default=25, help="measured blocks of each probe (default 25)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Measure, and write a profile."""
    path = Path(options.out)
    name = path.stem if options.name is None else options.name
    if path.suffix != ".toml":
        raise KanCompileError(f"--out: found suffix {path.suffix!r}, expected '.toml', as --profile reads it")
    if name in PROFILES:
        raise KanCompileError(f"--name: found {name!r}, a profile of the package, expected another name")

    from kancompile.compiler import check_destinations, write_atomically
    from kancompile.runtimes import describe_machine
    from kancompile.validation import measure_costs

    check_destinations([path], options.force)
    with working(options):
        machine = describe_machine()
        profile = read_profile({"name": name, **measure_costs(options.repeats)})
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    comments = f"Measured by kancompile profile in one thread, medians, on {described}."
    write_atomically({path: profile.to_toml(comments).encode()}, options.force)
    show_result(options, profile.to_dict() | {"path": str(path), "machine": machine}, _table(profile, path))
    return OK


def _table(profile: CostProfile, path: Path) -> str:
    """Set costs beside those of the default profile."""
    lines, usual = [], package_profile(DEFAULT_PROFILE)
    for title, costs, others in (
        ("integer layers", profile.look_up, usual.look_up),
        ("float and 16-bit layers", profile.functions, usual.functions),
    ):
        lines.append(f"{title:<24}{'ns':>10}{DEFAULT_PROFILE:>10}")
        for cost in fields(costs):
            own, other = getattr(costs, cost.name), getattr(others, cost.name)
            lines.append(f"  {cost.name:<22}{own:>10.4g}{other:>10.4g}  {cost.metadata['meaning']}")
    return "\n".join([*lines, f"wrote {path}"])


COMMAND = Command("profile", "measure what operators cost on this machine", TEXT, add_options, run)
