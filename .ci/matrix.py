"""Run some tests with the oldest and the newest versions that the metadata admits.

python .ci/matrix.py [--columns oldest newest] [--folder build/matrix] [--python python3.11]

Every column is a virtual environment of its own, kept for the next run. PyTorch is the one of constraints.txt in all of them,
since newer ones bring gigabytes; of the other dependencies the oldest column has the lower bounds of pyproject.toml, the newest
what the package index offers today. Prints a table, and writes matrix.json into the folder after every column.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/compiler/test_chains.py",  # capture, tables, rounding, emission, ONNX Runtime
    "tests/compiler/test_allocation.py",  # scipy's integer programs
    "tests/passes/rounding_methods/test_uniform.py",
    "tests/targets/test_external_data.py",  # onnx, onnx-ir
    "tests/targets/test_naming.py",
    "tests/validation/test_measured_costs.py",
    "tests/fuzzing/test_readers.py",  # numpy, safetensors
)
BESIDE = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "jsonschema>=4.18", "scikit-learn>=1.4", "pillow>=10")
"""What the tests themselves need; not what is looked at here."""
SHOWN = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "ml-dtypes", "numpy", "scipy", "safetensors", "tqdm")


def bounds() -> dict[str, str]:
    """Give the lower bound of every dependency of the package."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", one) for one in listed]
    assert all(found), f"expected NAME>=VERSION for each of {listed}"
    return {one[1]: one[2] for one in found if one is not None}


def requirements(column: str) -> list[str]:
    """Say what pip installs in a column."""
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    others = {name: version for name, version in bounds().items() if name != "torch"}
    sign = "==" if column == "oldest" else ">="
    return [pinned[0], *(name + sign + version for name, version in others.items())]


def versions(python: Path) -> dict[str, str]:
    """Ask an environment for what it has."""
    shown = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    return {
        one["name"].lower().replace("_", "-"): one["version"]
        for one in json.loads(shown.stdout)
        if one["name"].lower().replace("_", "-") in SHOWN
    }


def run(column: str, folder: Path, python: str, tests: list[str]) -> dict[str, Any]:
    """Install a column and run the tests there."""
    place, report = folder / column, folder / f"{column}.xml"
    inside = place / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", place], check=True)
    wanted = requirements(column)
    upgrade = ["--upgrade"] if column == "newest" else []
    installed = subprocess.run(
        [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *upgrade, *wanted, *BESIDE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if installed.returncode:
        return {"column": column, "asked": wanted, "outcome": "not installed", "said": installed.stderr[-2000:]}
    report.unlink(missing_ok=True)
    start = time.monotonic()
    ran = subprocess.run(
        [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", f"--junit-xml={report}", *tests],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    counted = {"tests": "0", "failures": "0", "errors": "0", "skipped": "0"}
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counted |= {} if suite is None else {name: suite.get(name, "0") for name in counted}
    print(ran.stdout[-3000:] if ran.returncode else ran.stdout.strip().splitlines()[-1], flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    return {
        "column": column, "versions": versions(inside), "outcome": "passed" if ran.returncode == 0 else "failed",
        "seconds": round(time.monotonic() - start), "failed": failed, **{name: int(count) for name, count in counted.items()},
    }  # fmt: skip


def main() -> int:
    """Run the columns and return how many did not pass, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--columns", nargs="+", choices=("oldest", "newest"), default=["oldest", "newest"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--python", default=sys.executable, help="of the environments (default: this one)")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "matrix.json"
    known = json.loads(log.read_text()) if log.exists() else []
    for column in options.columns:
        found = run(column, folder, options.python, options.tests)
        known = [*(one for one in known if one["column"] != column), found]
        log.write_text(json.dumps(known, indent=1) + "\n")
    print("| column | " + " | ".join(SHOWN) + " | tests | outcome |\n|" + "---|" * (len(SHOWN) + 3))
    for one in known:
        shown = one.get("versions", {})
        cells = [one["column"], *(shown.get(name, "") for name in SHOWN), str(one.get("tests", "")), one["outcome"]]
        print("| " + " | ".join(cells) + " |")
    return int(any(one["outcome"] != "passed" for one in known))


if __name__ == "__main__":
    sys.exit(main())
