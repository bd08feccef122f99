"""One event for each turn, none for progress."""

from __future__ import annotations

import pytest

from ckpt2pt_operator.rules.notes import notes
from simulation import Raw


def turn(kind: str, status: str, reason: str, message: str = "m") -> Raw:
    return {"conditions": [{"type": kind, "status": status, "reason": reason, "message": message}]}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"jobUID": "1", "job": "demo-1"}, [("Normal", "JobCreated")]),
        ({"jobUID": "1"}, {"jobUID": "1"}, []),
        ({"jobUID": "1"}, {"jobRecreations": 1}, [("Warning", "JobRecreated")]),
        ({"retryToken": "a", "phase": "Failed"}, {"retryToken": "b"}, [("Normal", "RetryRequested")]),
        ({"retryToken": "a", "phase": "Running"}, {"retryToken": "b"}, [("Warning", "RetryIgnored")]),
        ({}, {"retryToken": "b"}, []),
        ({}, {"memoryPercent": 150}, [("Normal", "MemoryGrown")]),
        ({}, turn("Complete", "True", "AllStagesSucceeded"), [("Normal", "AllStagesSucceeded")]),
        ({}, turn("Failed", "True", "StageFailed"), [("Warning", "StageFailed")]),
        ({}, turn("Failed", "True", "Cancelled"), [("Normal", "Cancelled")]),
        ({}, turn("Failed", "False", "InProgress"), []),
        ({}, turn("Degraded", "True", "OOMKilled"), [("Warning", "OOMKilled")]),
        (turn("Degraded", "True", "Evicted"), turn("Degraded", "True", "OOMKilled"), [("Warning", "OOMKilled")]),
        (turn("Degraded", "True", "Evicted"), turn("Degraded", "True", "Evicted", "other"), []),
        ({}, turn("VolumesReady", "False", "PVCNotFound"), [("Warning", "PVCNotFound")]),
        (turn("VolumesReady", "True", "Bound"), turn("VolumesReady", "True", "WorkersLimited"), [("Warning", "WorkersLimited")]),
        (turn("VolumesReady", "True", "WorkersLimited"), turn("VolumesReady", "True", "Bound"), []),
        (turn("Suspended", "False", "Resumed"), turn("Suspended", "False", "QueueDecides"), [("Warning", "QueueDecides")]),
        (turn("Suspended", "True", "Preempted"), turn("Suspended", "False", "QueueDecides") | {"phase": "Running"}, [("Warning", "QueueDecides"), ("Normal", "Resumed")]),
        ({}, turn("Suspended", "True", "UserRequested"), [("Normal", "UserRequested")]),
        (turn("Suspended", "True", "UserRequested"), turn("Suspended", "False", "Resumed") | {"phase": "Running"}, [("Normal", "Resumed")]),
        ({}, turn("Reconciling", "True", "WaitingForTraining"), [("Normal", "WaitingForTraining")]),
        ({}, {"warnings": ["a", "b"]}, [("Warning", "ConversionWarning")] * 2),
        ({"warnings": ["a", "b"]}, {"warnings": ["a", "b"]}, []),
        ({"progress": "1%"}, {"progress": "2%"}, []),
    ],
)  # fmt: skip
def test_notes(before: Raw, after: Raw, expected: list[tuple[str, str]]) -> None:
    assert [(note.kind, note.reason) for note in notes(before, after)] == expected


def test_many_failed_stages_are_few_events_and_each_is_named() -> None:
    stages = [{"stage": stage, "state": "Failed", "reason": "InputWrong", "message": "x" * 2000} for stage in range(20)]
    found = notes({}, {"stageStatuses": stages})
    assert len(found) == 9
    assert "19" in found[-1].message
    assert max(len(note.message) for note in found) <= 1024
    assert not notes({"stageStatuses": stages}, {"stageStatuses": stages})
