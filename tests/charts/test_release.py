"""What is published: the images' build, the chart's package, the workflow that makes them."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from charts import CHART, DEPLOY, images, run
from ckpt2pt import __version__
from documents import crd
from goldens import REPOSITORY
from helm import VERSIONS, MissingError, actionlint

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").iterdir())
REGISTRY, SOURCE = "registry.example.com/team", "https://git.example.com/team/ckpt2pt"
DIGESTS = {"operator": f"sha256:{'a' * 64}", "worker": f"sha256:{'b' * 64}"}
IMAGES = [f"{REGISTRY}/ckpt2pt-operator@{DIGESTS['operator']}", f"{REGISTRY}/ckpt2pt@{DIGESTS['worker']}"]
NAMES = {"operator": "ckpt2pt-operator", "converter": "ckpt2pt"}
"""Stage of the Dockerfile -> repository of the image, as the chart names it."""


def chart_yaml(chart: Path = CHART) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((chart / "Chart.yaml").read_text())
    return found


def annotation(chart: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(chart_yaml(chart)["annotations"][f"artifacthub.io/{name}"])
    return found


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """The chart as it would be published."""
    return Path(package(tmp_path, *(f"--{name}={digest}" for name, digest in DIGESTS.items())).strip())


def package(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "charts" / "package.py", f"--registry={REGISTRY}", f"--source={SOURCE}", f"--to={folder}", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------------------- metadata


def test_the_chart_says_what_is_true_wherever_it_lies() -> None:
    chart = chart_yaml()
    kind, _, data = chart["icon"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert ET.fromstring(base64.b64decode(data, validate=True)).tag == "{http://www.w3.org/2000/svg}svg"
    assert "the ckpt2pt authors" in (REPOSITORY / "LICENSE").read_text()
    assert chart["maintainers"] == [{"name": "the ckpt2pt authors"}]
    assert chart["annotations"]["artifacthub.io/license"] == "Apache-2.0"
    assert not {"home", "sources"} & set(chart), "nothing is published from here"
    [reported], [version] = annotation(CHART, "crds"), crd()["spec"]["versions"]
    assert (reported["name"], reported["kind"]) == (crd()["metadata"]["name"], crd()["spec"]["names"]["kind"])
    assert reported["version"] == version["name"]


def test_a_published_chart_names_its_source_its_images_and_what_changed(packaged: Path) -> None:
    chart = chart_yaml(packaged)
    assert (chart["home"], chart["sources"]) == (SOURCE, [SOURCE])
    assert {key: chart[key] for key in chart_yaml() if key != "annotations"} == {
        key: value for key, value in chart_yaml().items() if key != "annotations"
    }
    assert chart["annotations"].items() >= chart_yaml()["annotations"].items()
    assert [image["image"] for image in annotation(packaged, "images")] == IMAGES
    changes = annotation(packaged, "changes")
    released = (REPOSITORY / "CHANGELOG.md").read_text().partition(f"## [{__version__}]")[2].partition("\n## [")[0]
    kinds = dict(re.findall(r"(?ms)^### (\w+)[^\n]*\n(.*?)(?=^###|\Z)", released))
    kinds.pop("Different", None)  # from the reference, and no change
    assert len(changes) == sum(len(re.findall(r"(?m)^- ", entries)) for entries in kinds.values()) > 0
    assert {change["kind"] for change in changes} <= {"added", "changed", "deprecated", "removed", "fixed", "security"}
    assert not [change for change in changes if "](" in change["description"]], "links that lead nowhere from there"


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize("major", VERSIONS)
def test_a_published_chart_is_installed_without_any_value(packaged: Path, major: str) -> None:
    try:
        linted = run(major, "lint", "--strict", packaged)
    except MissingError as reason:
        pytest.skip(str(reason))
    assert (linted.code, re.findall(r"\[(?:WARNING|ERROR|INFO)\].*", linted.stdout)) == (0, []), linted
    assert images(run(major, "template", "ckpt2pt", packaged, "--kube-version=1.32.0")) == IMAGES


def test_a_digest_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="'latest' is no digest of an image"):
        package(tmp_path, "--operator=latest", f"--worker={DIGESTS['worker']}")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- images


def test_bake_make_and_static_manifests_name_the_images_as_the_chart_does() -> None:
    bake, make = (REPOSITORY / "docker-bake.hcl").read_text(), (REPOSITORY / "Makefile").read_text()
    assert re.search(r'variable "VERSION" { default = "(.*)" }', bake)[1] == __version__  # type: ignore[index]
    targets = re.findall(
        r'target = "(\w+)"\n *tags *= \[trimprefix\("\${REGISTRY}/(\S+):\${VERSION}"', bake.replace("   =", " =")
    )
    assert dict(targets) == NAMES == dict(re.findall(r"\b(operator|converter):([\w-]+)(?=[ ;])", make))
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [values["image"]["repository"], values["worker"]["image"]["repository"]] == list(NAMES.values())
    [images] = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["configMapGenerator"]
    tagged = [f"{REGISTRY}/{name}:{__version__}" for name in NAMES.values()]
    assert [literal.partition("=")[2] for literal in images["literals"]] == tagged


# --------------------------------------------------------------------------------------------------------------- workflow


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_right_that_no_job_asks_for_and_runs_no_action_that_can_change(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    assert all(job["permissions"] for job in workflow["jobs"].values())
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: say which version it is"


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_workflows_are_right_as_far_as_actionlint_sees() -> None:
    try:
        program = actionlint()
    except MissingError as reason:
        pytest.skip(str(reason))
    found = subprocess.run([program, *WORKFLOWS], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
