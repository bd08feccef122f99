"""The status of a run is a function of what is known of its stages, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from ckpt2pt.errors import EXIT_CODES
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import MAX_MESSAGE, REASONS, Ending, StageRecord, disagreement, status_of_run
from documents import changed, root_schema

BEGIN, END = "2026-11-24T08:00:00Z", "2026-11-24T09:00:00Z"


def stage(number: int, state: Any = "Pending", **more: Any) -> StageRecord:
    return StageRecord(stage=number, state=state, **more)


def status(records: Sequence[StageRecord], *changes: tuple[str, object], **more: Any) -> Any:
    return status_of_run(parse(changed(*changes)), records, job="demo-1", **{"started": BEGIN, **more})


def conditions(document: Any) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in document["conditions"]}


DONE = stage(0, "Succeeded", iteration=500, verified="Digest")
BAD, WAITS, RUNS = (stage(0, state) for state in ("Failed", "Pending", "Running"))


@pytest.mark.parametrize(
    ("records", "more", "phase"),
    [
        pytest.param([WAITS], {"started": None}, "Pending", id="not-begun"),
        pytest.param([RUNS, WAITS], {}, "Running", id="running"),
        pytest.param([BAD, RUNS], {}, "Running", id="one-failed-and-others-go-on"),
        pytest.param([DONE, DONE], {"finished": END}, "Succeeded", id="all-done"),
        pytest.param([DONE, BAD], {"finished": END}, "Failed", id="one-failed"),
        pytest.param([DONE, WAITS], {"finished": END, "ended": Ending(reason="Interrupted", message="")}, "Failed", id="stopped"),
        pytest.param([WAITS], {"finished": END, "ended": Ending(reason="Cancelled", message="")}, "Cancelled", id="cancelled"),
    ],
)  # fmt: skip
def test_phase(records: list[StageRecord], more: dict[str, Any], phase: str) -> None:
    assert status(records, **more)["phase"] == phase


def test_a_dry_run_ends_planned_and_has_no_report() -> None:
    document = status([DONE], ("spec.dryRun", True), finished=END, iteration=2)
    assert document["phase"] == "Planned"
    assert conditions(document)["Complete"] == ("True", "Planned")
    assert conditions(document)["Verified"] == ("False", "NotRequested")
    assert "reportPath" not in document


def test_progress_is_the_mean_of_the_stages_also_of_those_whose_size_is_not_known_yet() -> None:
    document = status([stage(0, "Succeeded"), stage(1, "Running", done=50, total=100), stage(2), stage(3)])
    assert document["progress"] == "37%"
    assert document["stageSummary"] == "1/4"
    assert document["stages"] == {"total": 4, "active": 1, "succeeded": 1, "failed": 0}
    assert (document["bytesDone"], document["bytesTotal"]) == (50, 100)
    assert status([DONE], finished=END)["progress"] == "100%"


def test_paths_are_relative_to_the_target_volume() -> None:
    document = status([DONE], finished=END, iteration=500)
    assert document["outputPath"] == "out/iter_0000500"
    assert document["reportPath"] == "out/iter_0000500/.ckpt2pt/report.json"
    assert status([DONE], ("spec.target.path", "."), iteration=500)["outputPath"] == "iter_0000500"
    assert not {"iteration", "outputPath", "reportPath"} & set(status([DONE], finished=END))
    model = status([DONE], ("spec.target.format", "Safetensors"), finished=END, iteration=500)
    assert (model["outputPath"], model["reportPath"]) == ("out", "out/.ckpt2pt/report.json")


def test_conditions_of_success() -> None:
    found = conditions(status([DONE, DONE], finished=END))
    assert found == {
        "Complete": ("True", "AllStagesSucceeded"),
        "Failed": ("False", "AllStagesSucceeded"),
        "Verified": ("True", "DigestsMatch"),
        "Ready": ("True", "AllStagesSucceeded"),
        "Reconciling": ("False", "AllStagesSucceeded"),
        "Stalled": ("False", "AllStagesSucceeded"),
    }


def test_conditions_of_failure_name_the_stage_and_its_message() -> None:
    failed = stage(1, "Failed", reason="InputWrong", message="num_layers is 2")
    document = status([stage(0, "Succeeded"), failed], finished=END)
    assert conditions(document)["Failed"] == ("True", "StageFailed")
    assert conditions(document)["Stalled"] == ("True", "StageFailed")
    [ready] = [c for c in document["conditions"] if c["type"] == "Ready"]
    assert ready["status"] == "False"
    assert "stage 1: num_layers is 2" in ready["message"]
    assert ready["lastTransitionTime"] == END


def test_a_difference_is_not_verified() -> None:
    document = status([stage(0, "Failed", reason=REASONS[76])], finished=END)
    assert conditions(document)["Verified"] == ("False", "DigestMismatch")
    assert conditions(status([DONE], ("spec.verify", "None"), finished=END))["Verified"] == ("False", "NotRequested")


def test_every_exit_code_has_a_reason_in_one_word() -> None:
    assert set(REASONS) == set(EXIT_CODES) - {0}
    assert all(reason.isalpha() for reason in REASONS.values())


def test_long_messages_are_cut() -> None:
    document = status([stage(0, "Failed", message="x" * 5000)], finished=END)
    assert len(document["stageStatuses"][0]["message"]) == MAX_MESSAGE
    assert all(len(c["message"]) <= MAX_MESSAGE for c in document["conditions"])


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(status([WAITS], started=None), id="pending"),
        pytest.param(status([stage(0, "Running", done=1, total=2, throughput=3, attempts=1, node="n"), stage(1)]), id="running"),
        pytest.param(status([DONE], finished=END, iteration=500), id="done"),
        pytest.param(status([stage(0, "Failed", reason="Bug", message="x" * 5000)], finished=END), id="failed"),
    ],
)  # fmt: skip
def test_the_crd_has_a_field_for_everything(document: dict[str, Any]) -> None:
    """An API server drops what the schema does not name: a status must lose nothing."""

    def strict(schema: dict[str, Any]) -> dict[str, Any]:
        found = {key: value for key, value in schema.items() if key in {"type", "enum", "required", "maxLength"}}
        if "properties" in schema:
            found["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
            found["additionalProperties"] = False
        if "items" in schema:
            found["items"] = strict(schema["items"])
        return found

    jsonschema.validate(document, strict(root_schema()["properties"]["status"]))


@pytest.mark.parametrize(
    ("iterations", "says"),
    [
        ([500, 500], None),
        ([500, None], None),
        ([None, None], None),
        (
            [510, 500, 510],
            "converted were iteration 500 of stage 1; iteration 510 of stage 0, 2; the source got a newer",
        ),
    ],
)
def test_stages_are_of_one_iteration(iterations: list[int | None], says: str | None) -> None:
    records = [stage(number, "Succeeded", iteration=each) for number, each in enumerate(iterations)]
    found = disagreement(records)
    assert (found is None) == (says is None)
    if found:
        assert says
        assert found.message.startswith(says)
        assert status(records, finished=END, ended=found)["phase"] == "Failed"


def test_many_stages_of_many_iterations_are_reported_in_few_words() -> None:
    found = disagreement([stage(number, "Succeeded", iteration=number + 1) for number in range(1024)])
    assert found
    assert len(found.message) < MAX_MESSAGE


@pytest.mark.parametrize(
    ("verify", "levels", "expected"),
    [
        ("Digest", ["Digest", "Full"], ("True", "DigestsMatch")),
        ("Full", ["Full", "Full"], ("True", "SourceMatches")),
        ("Full", ["Full", "Digest"], ("Unknown", "NotReported")),
        ("Digest", ["", "None"], ("Unknown", "NotReported")),
        ("None", ["Full", "Full"], ("False", "NotRequested")),
    ],
)
def test_verified_is_true_when_every_stage_says_so(verify: str, levels: list[str], expected: tuple[str, str]) -> None:
    records = [stage(number, "Succeeded", verified=level) for number, level in enumerate(levels)]
    assert conditions(status(records, ("spec.verify", verify), finished=END))["Verified"] == expected
