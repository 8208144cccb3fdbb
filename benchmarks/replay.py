"""Tell whether a change keeps every byte of every emitted file: compile the same on a base commit and on this tree.

Run from the root of the repository, with whatever is changed, committed or not::

    python -m benchmarks.replay BASE

Eight programs by ten recipes, two of them for all targets (:mod:`benchmarks.replay_programs`), are compiled by the base
commit, in a worktree of its own, and by this tree, side by side. Files, manifests and errors must be equal; the ratio of
processor times is printed beside. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.replay_programs import PROGRAMS, RECIPES, targets_of

ROOT = Path(__file__).resolve().parent.parent
Key = tuple[str, str, str]


def main(arguments: list[str] | None = None) -> int:
    """Compare, print what differs, and give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="only this one; may be repeated")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        _git("worktree", "add", "--quiet", "--detach", str(base), options.base)
        try:
            before, after = _compiled([base, ROOT], Path(folder), options.program or list(PROGRAMS))
        finally:
            _git("worktree", "remove", "--force", str(base))
    differing = [key for key in dict.fromkeys((*before, *after)) if _found(before, key) != _found(after, key)]
    for key in differing:
        print(" / ".join(key))
        old, new = _found(before, key), _found(after, key)
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                print(f"  {name}\n    base: {old.get(name)}\n    tree: {new.get(name)}")
    seconds = [sum(line["seconds"] for line in found.values()) for found in (before, after)]
    errors = sum("error" in line["found"] for line in after.values())
    print(
        f"{len(after)} outcomes ({errors} of them refusals): {len(differing)} differ from {options.base}; "
        f"processor time {seconds[1] / seconds[0]:.3f} of the base's"
    )
    return 1 if differing else 0


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)


def _compiled(trees: list[Path], folder: Path, programs: list[str]) -> list[dict[Key, dict[str, Any]]]:
    """Run the programs with every tree at the same time and read what each found."""
    script = str(Path(__file__).with_name("replay_programs.py"))
    files = [folder / f"{number}.jsonl" for number in range(len(trees))]
    children = []
    for tree, path in zip(trees, files, strict=True):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, str(path), str(tree), *programs]
        with path.with_suffix(".log").open("w") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    total = len(programs) * sum(len(targets_of(recipe)) for recipe in RECIPES)
    with tqdm(total=total, disable=not sys.stderr.isatty(), desc="replay") as bar:
        while any(child.poll() is None for child in children):
            bar.update(min(_lines(path) for path in files) - bar.n)
            try:
                children[0].wait(timeout=1)
                children[1].wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
    for child, path in zip(children, files, strict=True):
        if child.returncode:
            raise SystemExit(f"{child.args!r} failed:\n{path.with_suffix('.log').read_text()[-3000:]}")
    return [_read(path) for path in files]


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _read(path: Path) -> dict[Key, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["program"], line["recipe"], line["target"]): line for line in lines}


def _found(outcomes: dict[Key, dict[str, Any]], key: Key) -> dict[str, str]:
    return dict(outcomes[key]["found"]) if key in outcomes else {}


if __name__ == "__main__":
    sys.exit(main())
