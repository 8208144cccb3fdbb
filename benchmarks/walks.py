"""Run the walks of the documentation from a wheel, in an environment of their own, and print the time that each takes.

    python -m benchmarks.walks                      # builds a wheel and an environment first, which is not counted
    python -m benchmarks.walks --python env/bin/python --walks table paper

Commands run in an empty folder with what the pages name: ``models.py``, a checkpoint and data. Nothing of the checkout but the
zoo that holds the example's network can be imported there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WALKS = ROOT / "docs" / "walks"
WALK_NAMES = sorted(path.stem for path in WALKS.glob("*.md") if path.stem != "index")
DIGITS = ROOT / "examples" / "digits"
# a checkout on the path would count as installed
OUTSIDE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
FENCE = re.compile(r"^```(python|sh|console)\n(.*?)^```", re.M | re.S)
MODELS = """\
from examples.zoo.efficient_kan import build


def make_kan(widths=(64, 64, 10)):
    return build(widths=tuple(widths))
"""
NAMES = """\
import matplotlib
import numpy as np
from safetensors.torch import load_file
from models import make_kan

matplotlib.use("Agg")
model = make_kan()
model.load_state_dict(load_file("kan.safetensors"))
model.eval()
_train, _test = np.load("train.npz"), np.load("test.npz")
calibration, x_test, y_test = _train["x"], _test["x"], _test["y"]
"""


def script_of(page: str) -> str:
    """Put the blocks of a page into one shell script; all Python blocks of a page share one process, at the place of the last."""
    blocks = FENCE.findall(page)
    lines, python = ["set -euo pipefail"], ""
    last = max((number for number, (language, _) in enumerate(blocks) if language == "python"), default=-1)
    is_apart = any(language != "python" for language, _ in blocks)
    for number, (language, text) in enumerate(blocks):
        if language == "python":
            python += text
            if is_apart or number == last:
                names = (
                    NAMES if re.search(r"\b(model|calibration|x_test)\b", python) and "kan.KAN" not in python else ""
                )
                lines.append(f"python - <<'PYTHON'\n{names}{python}PYTHON")
                python = ""
        else:
            joined = text.replace("\\\n", " ").splitlines()
            shown = language == "console"
            lines += [line.removeprefix("$ ") for line in joined if not shown or line.startswith("$ ")]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Walk:
    """What running a walk gave.

    Attributes:
        seconds: by the clock.
        processor_seconds: of all its processes, which a busy machine hardly changes.
        exit_code: 0 where every command did.
        text: the end of what it printed.
    """

    seconds: float
    processor_seconds: float
    exit_code: int
    text: str


def run_walk(walk: str, python: Path) -> Walk:
    """Run a walk in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models.py").write_text(MODELS)
        shutil.copytree(ROOT / "examples" / "zoo", folder / "examples" / "zoo")
        (folder / "examples" / "__init__.py").touch()
        for source, target in (
            ("efficient_kan_digits.safetensors", "kan.safetensors"),
            ("digits_calibration.npz", "train.npz"),
            ("digits_test.npz", "test.npz"),
        ):
            shutil.copy(DIGITS / source, folder / target)
        environment = OUTSIDE | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            ["bash", "-c", script_of((WALKS / f"{walk}.md").read_text())],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Walk(seconds, processor, done.returncode, (done.stdout + done.stderr)[-2000:])


def environment_of_a_wheel(folder: Path, borrow: bool = False) -> Path:
    """Build a wheel, install it with what the walks need into an empty environment, and return its interpreter.

    Args:
        folder: where both are made.
        borrow: whether the other packages are those of this environment, which takes seconds and no network; kancompile is the
            wheel's all the same.
    """
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, env=OUTSIDE)
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    python = folder / "environment" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    if borrow:
        subprocess.run([*install, "--no-deps", str(wheel)], check=True, env=OUTSIDE)
        own = next((folder / "environment").glob("lib/python*/site-packages"))
        # a line adds a path and runs no .pth there, so that kancompile stays the wheel's
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    else:
        wanted = f"{wheel}[plots,examples,pykan]"
        subprocess.run([*install, "--constraint", str(ROOT / "constraints.txt"), wanted], check=True, env=OUTSIDE)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter of an environment with a wheel (default: one is made)")
    parser.add_argument("--walks", nargs="+", choices=WALK_NAMES, default=WALK_NAMES, help="default: all")
    parser.add_argument("--borrow", action="store_true", help="take the other packages from this environment")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/walks.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        # absolute, but not resolved: the interpreter of an environment is a link
        python = (
            environment_of_a_wheel(Path(name), arguments.borrow)
            if arguments.python is None
            else arguments.python.absolute()
        )
        for walk in arguments.walks:
            found = run_walk(walk, python)
            results[walk] = {
                "seconds": round(found.seconds, 1),
                "processor_seconds": round(found.processor_seconds, 1),
                "exit_code": found.exit_code,
            }
            ended = "done" if found.exit_code == 0 else f"exit code {found.exit_code}"
            print(
                f"{walk:16} {found.seconds:6.1f} s, of processors {found.processor_seconds:6.1f} s  {ended}", flush=True
            )
            if found.exit_code:
                print(found.text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return max(int(result["exit_code"] != 0) for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
