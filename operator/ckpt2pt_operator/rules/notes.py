"""What changed between two statuses -> the events that tell it.  Pure.

An event is for a person who runs ``kubectl describe``: one for each turn, none for progress.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ckpt2pt.kube.conversion.report import number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.status import WAITING
from ckpt2pt_operator.rules.conditions import QUEUE_DECIDES, WORKERS_LIMITED
from ckpt2pt_operator.rules.views import condition, items, texts

_MAX = 1024
_UNHEEDED = frozenset({QUEUE_DECIDES, WORKERS_LIMITED})
_AWAITED = frozenset({"WaitingForTraining", WAITING})
_MOST_STAGES = 8
"""Failed stages that get an event each; an API server takes few of them a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One event."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def notes(before: Json, after: Json) -> tuple[Note, ...]:
    """The events between two statuses, in the order in which things happen."""
    warnings = (
        Note(kind=note.kind, reason=note.reason, message=note.message[:_MAX])
        for note in (
            *_of_the_job(before, after),
            *_of_stages(before, after),
            *_of_warnings(before, after),
            *_of_conditions(before, after),
        )
    )
    return tuple(dict.fromkeys(warnings))  # two conditions may say the same


def _of_the_job(before: Json, after: Json) -> Iterator[Note]:
    job, old, new = text(after, "job"), text(before, "jobUID"), text(after, "jobUID")
    if number(after, "memoryPercent") > max(number(before, "memoryPercent"), 100):
        percent = number(after, "memoryPercent")
        yield Note(kind="Normal", reason="MemoryGrown", message=f"workers get {percent} % of the memory of the spec")
    if number(after, "jobRecreations") > number(before, "jobRecreations"):
        again = number(after, "attempt") > number(before, "attempt")
        lost = f"reports of workers were lost with their pods; Job {job} does those stages again"
        yield (
            Note(kind="Warning", reason="ReportLost", message=lost)
            if again
            else Note(kind="Warning", reason="JobRecreated", message=f"Job {job} was deleted and is recreated")
        )
    if text(after, "retryToken") != text(before, "retryToken") and "phase" in before:
        early = "it had not failed when ckpt2pt.dev/retry was set; if it does, set another value"
        late = Note(kind="Normal", reason="RetryRequested", message="the stages that are not done are tried again")
        yield late if before.get("phase") == "Failed" else Note(kind="Warning", reason="RetryIgnored", message=early)
    if new and new != old:
        stages = items(after, "stageStatuses")
        todo = [str(number(item, "stage")) for item in stages if text(item, "state") not in {"Succeeded", "Failed"}]
        what = f"stage {', '.join(todo)}" if len(todo) < len(stages) else f"all {len(stages)} stages"
        yield Note(kind="Normal", reason="JobCreated", message=f"Job {job} was made for {what}")


def _of_stages(before: Json, after: Json) -> Iterator[Note]:
    known = {number(item, "stage"): text(item, "state") for item in items(before, "stageStatuses")}
    failed = [
        item
        for item in items(after, "stageStatuses")
        if text(item, "state") == "Failed" != known.get(number(item, "stage"))
    ]
    for item in failed[:_MOST_STAGES]:
        why = f"stage {number(item, 'stage')}: {text(item, 'reason')}: {text(item, 'message')}"
        yield Note(kind="Warning", reason="StageFailed", message=why)
    if len(failed) > _MOST_STAGES:
        rest = ", ".join(str(number(item, "stage")) for item in failed[_MOST_STAGES:])
        yield Note(kind="Warning", reason="StageFailed", message=f"so did stage {rest}; status.stageStatuses says why")


def _of_warnings(before: Json, after: Json) -> Iterator[Note]:
    known = texts(before, "warnings")
    for warning in texts(after, "warnings"):
        if warning not in known:
            yield Note(kind="Warning", reason="ConversionWarning", message=warning)


#   condition       kind when it is True       also when its reason changes
_EVENTS: dict[str, tuple[Literal["Normal", "Warning"], bool]] = {
    "Degraded":     ("Warning", True),
    "Suspended":    ("Normal", True),
    "Complete":     ("Normal", False),
    "Failed":       ("Warning", False),
}  # fmt: skip


def _of_conditions(before: Json, after: Json) -> Iterator[Note]:
    old, new = items(before, "conditions"), items(after, "conditions")
    for item in new:
        name, reason, message = text(item, "type"), text(item, "reason"), text(item, "message")
        was = condition(old, name)
        turned = item.get("status") != was.get("status")
        if name == "VolumesReady" and item.get("status") == "False" and (turned or reason != was.get("reason")):
            yield Note(kind="Warning", reason=reason, message=message)
        if reason in _UNHEEDED and reason != was.get("reason"):
            yield Note(kind="Warning", reason=reason, message=message)
        if name == "Reconciling" and reason in _AWAITED and reason != was.get("reason"):
            yield Note(kind="Normal", reason=reason, message=message)
        if name not in _EVENTS:
            continue
        kind, follows = _EVENTS[name]
        if item.get("status") == "True" and (turned or (follows and reason != was.get("reason"))):
            yield Note(kind="Normal" if reason == "Cancelled" else kind, reason=reason, message=message)
        if name == "Suspended" and turned and was.get("status") == "True" and after.get("phase") == "Running":
            yield Note(kind="Normal", reason="Resumed", message="it may go on")
