"""What helm, Flux and Argo CD see of a conversion, by the libraries that they use; docs/gitops.md says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import kstatus as judge
from ckpt2pt.kube.conversion.status import TERMINAL
from documents import crd
from goldens import REPOSITORY
from helm import MissingError
from simulation import conversion
from standings import statuses
from statuses import expected_of, kstatus, reported

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the first test may build the judge


def objects(found: list[Any], generation: int = 3) -> list[dict[str, Any]]:
    return [{**conversion(), "metadata": {"name": "demo", "generation": generation}, "status": each} for each in found]


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return list(statuses())


def asked(ask: Any, *words: Any) -> list[str]:
    try:
        return list(ask(*words))
    except MissingError as reason:
        pytest.skip(str(reason))


def test_kstatus_sees_an_end_as_it_is_and_what_needs_somebody_as_a_failure(found: list[Any]) -> None:
    assert len(found) > 4000
    answers = asked(judge.kstatus, objects(found))
    for status, answer in zip(found, answers, strict=True):
        assert answer == expected_of(status) == kstatus(status, 3), status
    assert set(answers) == {"Current", "InProgress", "Failed"}


def test_what_is_not_observed_yet_is_in_progress(found: list[Any]) -> None:
    """After an edit, and before an operator has looked at all."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fresh = schema["properties"]["status"]["default"]
    assert set(asked(judge.kstatus, objects(found, 4) + objects([fresh], 1))) == {"InProgress"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The health script of the documentation."""
    text = (REPOSITORY / "docs" / "gitops.md").read_text()
    [block] = [block for block in text.split("```yaml\n")[1:] if "resource.customizations" in block]
    [source] = yaml.safe_load(block.split("```")[0])["data"].values()
    path = tmp_path / "health.lua"
    path.write_text(source)
    return path


def argo(status: Any) -> str:
    if status["phase"] in TERMINAL or reported(status, "Stalled")[0] == "True":
        return {"Current": "Healthy", "Failed": "Degraded"}[expected_of(status)]
    return "Suspended" if reported(status, "Suspended")[0] == "True" else "Progressing"


def test_argo_cd_sees_the_same(found: list[Any], script: Path) -> None:
    answers = asked(judge.argo_health, script, objects(found))
    for status, answer in zip(found, answers, strict=True):
        [ready] = [c["message"] for c in status["conditions"] if c["type"] == "Ready"]
        assert answer == f"{argo(status)}: {ready}"
    assert {answer.split(":")[0] for answer in answers} == {"Healthy", "Degraded", "Suspended", "Progressing"}


def test_argo_cd_waits_for_what_is_not_observed_yet(found: list[Any], script: Path) -> None:
    bare: list[dict[str, Any]] = [{"metadata": {"generation": 1}}, {"metadata": {"generation": 1}, "status": {}}]
    answers = asked(judge.argo_health, script, objects(found, 4) + objects([{"observedGeneration": -1}], 1) + bare)
    assert set(answers) == {"Progressing: no operator has looked at it, or at its last edit"}
