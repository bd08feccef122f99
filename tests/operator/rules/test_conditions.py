"""Each row of the table of conditions, and times that move only when a status turns."""

from __future__ import annotations

from datetime import timedelta

import pytest

from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import TERMINAL, Ending, StageRecord
from ckpt2pt_operator.rules.conditions import StatusInput, follows, refused_document, stamp, status_document
from ckpt2pt_operator.rules.stages import Blocker
from simulation import START, conversion
from standings import statuses
from statuses import check_status, expected_of, kstatus, reported

RUNNING = tuple(StageRecord(stage=stage, state="Running") for stage in range(4))
DONE = tuple(StageRecord(stage=stage, state="Succeeded", verified="Digest") for stage in range(4))
BAD = (*DONE[:3], StageRecord(stage=3, state="Failed", reason="DigestMismatch", message="differs"))
OVER = stamp(START)


def recorded(status: object) -> list[str]:
    """States of the stages."""
    assert isinstance(status, dict)
    return [item["state"] for item in status["stageStatuses"]]


def blocker(reason: str) -> Blocker:
    return Blocker(reason=reason, message="m")


@pytest.mark.parametrize(
    ("status_input", "phase", "expected"),
    [
        ({"records": RUNNING}, "Running", {"Accepted": ("True", "Valid"), "Reconciling": ("True", "InProgress"), "Stalled": ("False", "InProgress")}),
        ({"records": [StageRecord(stage=0)]}, "Pending", {"Ready": ("False", "InProgress")}),
        ({"records": RUNNING, "suspended": blocker("UserRequested")}, "Suspended", {"Suspended": ("True", "UserRequested")}),
        ({"records": RUNNING, "suspended": blocker("QueuedByKueue")}, "Queued", {"Suspended": ("True", "QueuedByKueue")}),
        ({"records": RUNNING}, "Running", {"Suspended": ("False", "Resumed"), "Degraded": ("False", "AsExpected")}),
        ({"records": RUNNING, "degraded": blocker("StageRetrying")}, "Running", {"Degraded": ("True", "StageRetrying"), "Stalled": ("False", "StageRetrying")}),
        ({"records": RUNNING, "degraded": blocker("ImagePullBackOff")}, "Running", {"Stalled": ("True", "ImagePullBackOff")}),
        ({"records": RUNNING, "waits": blocker("PVCNotFound"), "volumes": ("False", "PVCNotFound", "m")}, "Running", {"VolumesReady": ("False", "PVCNotFound"), "Stalled": ("True", "PVCNotFound")}),
        ({"records": DONE, "finished": OVER}, "Succeeded", {"Complete": ("True", "AllStagesSucceeded"), "Ready": ("True", "AllStagesSucceeded"), "Verified": ("True", "DigestsMatch"), "Reconciling": ("False", "AllStagesSucceeded")}),
        ({"records": BAD, "finished": OVER}, "Failed", {"Failed": ("True", "StageFailed"), "Stalled": ("True", "StageFailed"), "Verified": ("False", "DigestMismatch")}),
        ({"records": RUNNING, "finished": OVER, "ended": Ending(reason="Cancelled", message="m")}, "Cancelled", {"Failed": ("True", "Cancelled")}),
        ({"records": DONE, "finished": OVER, "ended": Ending(reason="ActiveDeadline", message="m")}, "Failed", {"Failed": ("True", "ActiveDeadline"), "Complete": ("False", "ActiveDeadline")}),
    ],
)  # fmt: skip
def test_conditions(status_input: dict[str, object], phase: str, expected: dict[str, tuple[str, str]]) -> None:
    document = conversion()
    found = status_document(parse(document), StatusInput(**status_input), before={}, generation=3, now=START)  # type: ignore[arg-type]
    check_status(found)
    assert (found["phase"], found["observedGeneration"]) == (phase, 3)
    assert {kind: reported(found, kind) for kind in expected} == expected


@pytest.mark.parametrize(
    ("follow", "status_input", "expected"),
    [
        ({"follow": {}}, {"records": RUNNING[:1]}, True),
        ({"follow": {}}, {"records": RUNNING[:1], "suspended": blocker("UserRequested")}, True),
        ({"follow": {}}, {"records": RUNNING[:1], "degraded": blocker("StageRetrying")}, True),
        ({"follow": {}}, {"records": DONE[:1], "finished": OVER}, True),
        ({"follow": {}, "dryRun": True}, {"records": RUNNING[:1]}, False),
        ({}, {"records": RUNNING}, False),
        ({}, {"records": DONE, "finished": OVER}, False),
    ],
)
def test_what_follows_a_training_is_known_by_its_status(
    follow: dict[str, object], status_input: dict[str, object], expected: bool
) -> None:
    document = parse(conversion(*((f"spec.{name}", value) for name, value in follow.items())))
    found = status_document(document, StatusInput(**status_input), before={}, generation=1, now=START)  # type: ignore[arg-type]
    assert follows(found) is expected
    assert not follows({})


def test_times_stay_until_the_status_turns() -> None:
    document = parse(conversion())
    first = status_document(document, StatusInput(records=RUNNING), before={}, generation=1, now=START)
    later = START + timedelta(hours=1)
    same = status_document(document, StatusInput(records=RUNNING), before=first, generation=1, now=later)
    assert same == first
    worse = StatusInput(records=RUNNING, degraded=Blocker(reason="OOMKilled", message="m"))
    turned = status_document(document, worse, before=first, generation=1, now=later)
    times = {c["type"]: c["lastTransitionTime"] for c in turned["conditions"]}  # type: ignore[attr-defined]
    assert times.pop("Degraded") == stamp(later)
    assert set(times.values()) == {stamp(START)}


def test_a_refused_document_keeps_what_is_recorded() -> None:
    before = status_document(parse(conversion()), StatusInput(records=(*DONE[:1], *RUNNING[1:])), before={}, generation=1, now=START)  # fmt: skip
    found = refused_document("wrong " * 1000, before=before, generation=2, now=START)
    check_status(found)
    assert recorded(found) == ["Succeeded"] + ["Pending"] * 3
    assert reported(found, "Accepted") == ("False", "InvalidSpec")


@pytest.mark.parametrize(
    "status_input",
    [
        {"suspended": blocker("UserRequested")}, {"degraded": blocker("ImagePullBackOff")},
        {"waits": blocker("PVCNotFound"), "volumes": ("False", "PVCNotFound", "m")},
        {"waits": blocker("QuotaExceeded"), "pending_since": OVER},
    ],
    ids=["suspended", "degraded", "waiting", "pending"],
)  # fmt: skip
def test_a_refused_document_is_neither_suspended_nor_degraded_any_more(status_input: dict[str, object]) -> None:
    begun = StatusInput(records=RUNNING, **status_input)  # type: ignore[arg-type]
    before = status_document(parse(conversion()), begun, before={}, generation=1, now=START)
    found = refused_document("wrong", before=before, generation=2, now=START)
    check_status(found)
    assert [reported(found, kind) for kind in ("Suspended", "Degraded")] == [("False", "Ended")] * 2
    assert reported(found, "Stalled") == ("True", "InvalidSpec")
    assert "pendingSince" not in found
    true = {condition["type"] for condition in found["conditions"] if condition["status"] == "True"}  # type: ignore[attr-defined]
    assert true <= {"Failed", "Stalled", "VolumesReady"}


def test_however_a_conversion_stands_its_conditions_agree() -> None:
    """``tests/e2e/test_kstatus.py`` asks the real kstatus the same."""
    found = list(statuses())
    for status in found:
        assert (kstatus(status, 3), kstatus(status, 4)) == (expected_of(status), "InProgress")
        over = status["phase"] in TERMINAL
        trouble = reported(status, "Stalled")[0] == "True" and not over
        suspended = reported(status, "Suspended")[0] == "True"
        assert not trouble or suspended or reported(status, "Degraded")[0] == "True", status
        assert not (over and suspended), status
    for status in found[:: len(found) // 200]:
        check_status(status)
