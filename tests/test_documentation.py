"""Every code block of the documentation runs, every link leads somewhere, and the pages build."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kancompile.passes.rounding_methods import METHODS
from kancompile.recipe import describe_keys, read_recipe
from kancompile.targets import TARGETS
from tests.documentation_pages import (
    PAGES,
    ROOT,
    Block,
    Runner,
    blocks,
    first_missing,
    headings,
    links,
    without_blocks,
)

DIGITS = ROOT / "examples" / "digits"
RUN = ("python", "sh", "console")
# what only shows text, what is read by other tools, and Sphinx's own
SHOWN = ("", "text", "{toctree}", "{eval-rst}", "{include}", "{recipe-keys}", "{image}")
ON_DEVICES = ("kotlin", "swift", "html")
MODELS = '''"""The model file that the pages speak of."""

from examples.zoo.efficient_kan import build


def make_kan(widths=(64, 64, 10)):
    return build(widths=tuple(widths))
'''

# every block that is not run, with the reason that its page gives: a new one has to be written down here
TESTS = "these commands run the tests that this page is checked by"
INDEX = "installs from a package index"
NOT_RUN = Counter(
    {
        ("CONTRIBUTING.md", TESTS): 1,
        ("README.md", INDEX): 1,
        ("README.md", TESTS): 1,
        ("docs/methods.md", "times differ between machines"): 1,
        ("docs/pykan.md", "trains a network; the tests of the example run it"): 1,
        ("docs/scale.md", "tests/test_processes.py runs the command on small networks"): 1,
        ("docs/targets/litert.md", INDEX): 1,
        ("docs/targets/mobile.md", "needs a checkout of ONNX Runtime and the Android NDK"): 1,
        ("docs/targets/ort-cpu.md", "downloads emulated processors"): 1,
        ("docs/targets/others.md", INDEX): 2,
        ("docs/targets/web.md", "installs from a package index and starts a server"): 1,
        ("docs/tutorial.md", INDEX): 1,
    }
)
NEEDS = {
    "README.md": "matplotlib",
    "docs/comparing.md": "matplotlib",
    "docs/pykan.md": "pykan",
    "docs/report.md": "matplotlib",
    "docs/targets/litert.md": "litert",
    "docs/targets/ort-cpu.md": "litert",  # writes the files of all targets
    "docs/troubleshooting.md": "matplotlib",
    "docs/walks/microcontroller.md": "c99",
    "docs/walks/newcomer.md": "matplotlib",
    "docs/walks/notebook.md": "matplotlib",
    "docs/walks/paper.md": "matplotlib",
    "docs/walks/pykan.md": "pykan",
}
# pages whose commands the default tests of their parts run too: a compilation takes seconds
SLOW = (
    "README.md",
    "docs/comparing.md",
    "docs/cost_profiles.md",
    "docs/diagnosis.md",
    "docs/families.md",
    "docs/methods.md",
    "docs/pykan.md",
    "docs/quantization_aware_training.md",
    "docs/report.md",
    "docs/sequences.md",
    "docs/several_inputs.md",
    "docs/targets/",
    "docs/transformers.md",
    "docs/troubleshooting.md",
    "docs/tutorial.md",
    "docs/walks/",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name: a model, its checkpoint in two formats, and data."""
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "models.py").write_text(MODELS)
    (tmp_path / "models.py").write_text(MODELS)
    shutil.copy(DIGITS / "efficient_kan_digits.safetensors", tmp_path / "kan.safetensors")
    torch.save(load_file(DIGITS / "efficient_kan_digits.safetensors"), tmp_path / "kan.pt")
    shutil.copy(DIGITS / "digits_calibration.npz", tmp_path / "train.npz")
    shutil.copy(DIGITS / "digits_test.npz", tmp_path / "test.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("models", "my_project", "my_project.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def names(folder: Path) -> dict[str, object]:
    """The variables that Python blocks may take for granted."""
    from examples.zoo.efficient_kan import build

    model = build(widths=(64, 64, 10))
    model.load_state_dict(load_file(folder / "kan.safetensors"))
    train, test = np.load(folder / "train.npz"), np.load(folder / "test.npz")
    data = {"x_train": train["x"], "y_train": train["y"], "x_test": test["x"], "y_test": test["y"]}
    return {"model": model.eval(), "calibration": train["x"], **data}


def runnable(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in RUN and block.not_run is None]


def marks(page: str) -> list[pytest.MarkDecorator]:
    needs = [pytest.mark.needs(NEEDS[page])] if page in NEEDS else []
    return [*needs, pytest.mark.slow] if page.startswith(SLOW) else needs


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page)) for page in PAGES if runnable(page)])
def test_the_blocks_of_a_page_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (TARGETS, METHODS):  # pages show how to add to them
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])
    before = {id(registry): set(registry) for registry in (TARGETS, METHODS)}
    runner = Runner(folder, names(folder))
    try:
        for block in runnable(page):
            with warnings.catch_warnings():
                runner.run(block)
    finally:
        for registry in (TARGETS, METHODS):
            for name in set(registry) - before[id(registry)]:
                registry.pop(name)  # type: ignore[attr-defined]


def test_blocks_that_do_not_run_are_known() -> None:
    marked = [block for page in PAGES for block in blocks(page) if block.not_run is not None]
    assert Counter((block.page, block.not_run) for block in marked) == NOT_RUN
    assert all(block.language in RUN for block in marked)


def test_no_block_escapes() -> None:
    everything = [block for page in PAGES for block in blocks(page)]
    allowed = {*RUN, *SHOWN, *ON_DEVICES, "c", "toml"}
    assert [block for block in everything if block.language not in allowed] == []
    hidden = ("kancompile ", "python ", "pip ", "make ", "npm ", "from ", "import ", "$ ")
    indented = [
        f"{page}: {line}"
        for page in PAGES
        for line in without_blocks(page).splitlines()
        if line.startswith("    ") and line.strip().startswith(hidden)
    ]
    assert indented == [], "indented code is not run; use a fence"


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page) if b.language == "toml"], ids=repr)
def test_recipes_are_valid(block: Block) -> None:
    assert read_recipe(tomllib.loads(block.text)) != read_recipe()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    # the pages in docs/project hold the text of a file at the top, so its links hold for both places
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link}"
        if anchor:
            name = target.relative_to(ROOT).as_posix()
            assert anchor in headings(name), f"{page}: {link}, anchors are {sorted(headings(name))}"


def test_every_page_is_in_the_navigation() -> None:
    listed = {line.strip() for line in "\n".join(b.text for b in blocks("docs/index.md")).splitlines()}
    pages = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page.startswith("docs/")} - {"index"}
    assert pages - listed == set()


def test_a_missing_line_is_noticed() -> None:
    printed = ["2 KAN layers", "  layers.0: 64 x 9", "passed"]
    assert first_missing(["2 KAN layers", "...layers.0: ... x 9", "passed"], printed) is None
    assert first_missing(["passed", "2 KAN layers"], printed) == "2 KAN layers"
    assert first_missing(["3 KAN layers"], printed) == "3 KAN layers"


def test_a_wrong_block_is_noticed(folder: Path) -> None:
    runner = Runner(folder, {})
    with pytest.raises(AssertionError, match="exit code 2"):
        runner.run(Block("README.md", 1, "sh", "kancompile recipe --weight-bits 99\n", None))
    with pytest.raises(AssertionError, match="not printed"):
        runner.run(Block("README.md", 1, "console", "$ kancompile recipe\nweight_bits = 9\n", None))
    with pytest.raises(NameError):
        runner.run(Block("README.md", 1, "python", "undefined\n", None))


@pytest.mark.slow  # `make docs` does the same
@pytest.mark.needs("sphinx")
def test_pages_build_and_load_nothing_from_a_network(tmp_path: Path) -> None:
    # warnings are errors: broken references, pages outside the navigation, docstrings that do not parse
    subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "-b", "html", "docs", tmp_path / "html"],
        cwd=ROOT,
        check=True,
    )
    page = (tmp_path / "html" / "recipes.html").read_text()
    for key, *_ in describe_keys():
        assert f">{key}<" in page
    for path in (tmp_path / "html").rglob("*.html"):
        loaded = [part for part in path.read_text().split("<") if part.startswith(("script", "link", "img", "iframe"))]
        assert not [part for part in loaded if 'src="http' in part or 'href="http' in part], (
            f"{path} loads from a network"
        )
