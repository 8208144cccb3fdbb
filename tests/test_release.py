"""What a release is made of: versions that agree, workflows that can run, files that the source distribution needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="no checkout")


def read(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


@pytest.mark.needs("yaml")
def test_versions_agree() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    # nothing is invented: what only owners know is listed in CONTRIBUTING.md
    assert not {"repository-code", "doi", "identifiers"} & set(citation)
    assert "urls" not in PROJECT


@pytest.mark.needs("yaml")
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_can_run(path: Path) -> None:
    """A part of the schema that ``make release`` checks whole, and what a schema cannot know."""
    workflow = read(path)
    assert workflow["name"] == path.stem
    assert True in workflow  # YAML 1.1 reads the key "on" so
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        assert set(job.get("needs", "").split()) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step.get("uses", "a/b@v1"))
            command, *words = step.get("run", "true").split()
            assert command != "make" or words[0] in targets
            assert not command.startswith(".ci/") or (ROOT / command).is_file()
        machines = job.get("strategy", {}).get("matrix", {})
        if "python" in machines:  # no classifier that nothing would confirm
            claimed = {line.split()[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
            assert claimed <= set(machines["python"])


@pytest.mark.needs("yaml")
def test_only_the_job_that_uploads_may_ask_for_a_token() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]
    assert {name for name, job in jobs.items() if "id-token" in job.get("permissions", {})} == {"publish"}
    assert jobs["publish"]["environment"] == "release"
    (tests,) = (path for path in WORKFLOWS if path.stem == "tests")
    machines = read(tests)["jobs"]["default"]["strategy"]["matrix"]["machine"]
    assert [name for name in ("ubuntu", "arm", "macos") if not any(name in machine for machine in machines)] == []
    assert "secrets." not in "".join(path.read_text() for path in WORKFLOWS)


def test_the_source_distribution_holds_what_the_documentation_includes() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    for page in sorted((ROOT / "docs" / "project").glob("*.md")):
        for name in re.findall(r"\{include\} (\S+)", page.read_text()):
            included = (page.parent / name).resolve().relative_to(ROOT)
            assert included.parts[0] in manifest
