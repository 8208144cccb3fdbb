"""Equal models, samples, recipes and seeds give equal files, whatever differs about the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kancompile.passes.one_thread import in_one_thread
from kancompile.recipe import METHODS

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import hashlib, json, sys
import torch
import kancompile
from examples.zoo import efficient_kan, kagn_conv
from kancompile.progress import quiet

torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(1)
cases = {
    "MLP": (lambda: efficient_kan.build((8, 24, 3), grid_size=3), torch.randn(400, 8, generator=draw)),
    "convolutions": (lambda: kagn_conv.build((1, 6, 8), (1, 2), 3), torch.randn(120, 1, 8, 8, generator=draw)),
}
for name in sys.argv[3:]:
    build, x = cases[name]
    for method in sys.argv[2].split(","):
        with quiet():
            made = kancompile.compile(build().eval(), x, recipe={"method": method, "weight_bits": 4}, seed=7)
        said = json.dumps(made.manifest, sort_keys=True)
        print(name, method, *(hashlib.sha256(one).hexdigest() for one in (made.model_bytes, said.encode())))
"""
PROCESSES = (
    (1, {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"}),
    (
        2,
        {
            "PYTHONHASHSEED": "4242",
            "LC_ALL": "C.UTF-8",
            "TZ": "Asia/Tokyo",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by computing take minutes where others compute as well
            "MKL_NUM_THREADS": "2",
        },
    ),
)


def hashes(methods: str, nets: tuple[str, ...], folder: Path) -> list[dict[str, tuple[str, ...]]]:
    """Compile in processes that differ in threads, hash seed, language, time zone and working directory."""
    found = []
    for number, (threads, environment) in enumerate(PROCESSES):
        where = folder / f"process {number}"
        where.mkdir()
        ran = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(threads), methods, *nets], capture_output=True, text=True, check=True, cwd=where,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )  # fmt: skip
        lines = [line.rsplit(" ", 3) for line in ran.stdout.splitlines()]
        found.append({f"{name} {method}": (model, manifest) for name, method, model, manifest in lines})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", ["MLP", "convolutions"])
def test_every_method_writes_equal_bytes_in_every_process(net: str, method: str, tmp_path: Path) -> None:
    one, other = hashes(method, (net,), tmp_path)
    assert list(one) == [f"{net} {method}"]
    changed = {
        case: [a == b for a, b in zip(one[case], other[case], strict=True)] for case in one if one[case] != other[case]
    }
    assert not changed, json.dumps(changed)


def test_one_thread_is_asked_for_and_given_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seen = in_one_thread()(torch.get_num_threads)()
        with pytest.raises(ZeroDivisionError):
            in_one_thread()(lambda: 1 / 0)()
        assert seen == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
