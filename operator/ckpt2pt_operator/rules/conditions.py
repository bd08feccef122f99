"""What was decided -> the status of a CheckpointConversion, conditions and all.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, cast

from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import FOLLOWED, FOLLOWING, MAX_MESSAGE, Ending, StageRecord, status_of_run
from ckpt2pt_operator.rules.seen import REFUSALS
from ckpt2pt_operator.rules.stages import Blocker
from ckpt2pt_operator.rules.views import condition, items

_MESSAGES = 256 << 10
"""Characters for the messages of all stages together: an object may have 1.5 MB."""

_STALLED = frozenset(
    {
        "PVCNotFound",
        "PVCLost",
        "AccessModeConflict",
        "ImagePullBackOff",
        "CreateContainerError",
        "PodRejected",
        "JobRefused",
        "NodeLost",
        "TrainingKindUnknown",
    }
)
"""What does not pass by itself: Stalled is True, and so Reconciling is False."""

_TROUBLES = _STALLED | REFUSALS
"""What is wrong, of all that a conversion may wait for."""

Verdict = tuple[Literal["True", "False", "Unknown"], str, str]
"""Status, reason and message of a condition."""

_ENDED = "Ended", "no worker is left"
NOT_LOOKED: Verdict = ("Unknown", "NotChecked", "not looked at yet")
WORKERS_LIMITED = "WorkersLimited"
"""The reason of VolumesReady where the volumes are ready for those workers that there are, and for no more."""
QUEUE_DECIDES = "QueueDecides"
"""The reason of Suspended where the spec asks for what only a queue may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusInput:
    """How a conversion stands.  ``waits`` is why no worker was asked for, ``degraded`` why workers do not get on.

    ``overridden_by_queue`` is what a queue decides in place of the spec, ``pending_since`` the time since when no Job could be made.
    """

    records: Sequence[StageRecord]
    attempt: int = 1
    job: str = ""
    job_uid: str = ""
    recreations: int = 0
    retry_token: str = ""
    memory_percent: int = 100
    pending_since: str | None = None
    started: str | None = None
    finished: str | None = None
    ended: Ending | None = None
    planned: str = ""
    iteration: int | None = None
    training_uid: str = ""
    follow_end: str = ""
    warnings: Sequence[str] = ()
    accepted: Verdict = ("True", "Valid", "the document describes a conversion")
    volumes: Verdict = NOT_LOOKED
    suspended: Blocker | None = None
    overridden_by_queue: Blocker | None = None
    waits: Blocker | None = None
    degraded: Blocker | None = None


def follows(status: Json) -> bool:
    """Whether this is the status of a conversion that follows a training, and gets on or is done."""
    return condition(items(status, "conditions"), "Complete").get("reason") in {FOLLOWING, FOLLOWED}


def stamp(moment: datetime) -> str:
    """A time as an API server writes it."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def status_document(
    conversion: Conversion, status_input: StatusInput, *, before: Json, generation: int, now: datetime
) -> Json:
    """The whole status; a condition keeps its time until its status changes."""
    spoken = sum(bool(record.message) for record in status_input.records)
    limit = min(MAX_MESSAGE, _MESSAGES // max(spoken, 1))
    found = status_of_run(
        conversion,
        [replace(record, message=record.message[:limit].rstrip()) for record in status_input.records],
        job=status_input.job,
        started=status_input.started,
        finished=status_input.finished,
        ended=status_input.ended,
        planned=status_input.planned,
        iteration=status_input.iteration,
        now=stamp(now),
    )
    if not status_input.finished:
        found["phase"] = _phase(status_input)
    own: Json = {
        "observedGeneration": generation,
        "attempt": status_input.attempt,
        "jobUID": status_input.job_uid,
        "jobRecreations": status_input.recreations,
        "retryToken": status_input.retry_token,
        "trainingUID": status_input.training_uid,
        "followEnd": status_input.follow_end,
        "pendingSince": status_input.pending_since,
        "warnings": list(status_input.warnings) or None,
        "memoryPercent": status_input.memory_percent if status_input.memory_percent != 100 else 0,
    }
    conditions = _conditions(status_input, {str(c["type"]): c for c in cast("list[Json]", found["conditions"])})
    previous = items(before, "conditions")
    found["conditions"] = [
        {
            **new,
            "observedGeneration": generation,
            "lastTransitionTime": _since(condition(previous, str(new["type"])), new),
        }
        for new in conditions
    ]
    return {name: value for name, value in (found | own).items() if value not in (None, "", 0) or name == "bytesDone"}


def refused_document(message: str, *, before: Json, generation: int, now: datetime) -> Json:
    """The status of a document that describes no conversion; results that are recorded stay."""
    previous, when = items(before, "conditions"), stamp(now)
    refused = "InvalidSpec", message[:MAX_MESSAGE]
    verdicts = (
        ("Accepted", "False", *refused), ("Suspended", "False", *_ENDED), ("Degraded", "False", *_ENDED),
        ("Complete", "False", *refused), ("Failed", "True", *refused), ("Ready", "False", *refused),
        ("Reconciling", "False", *refused), ("Stalled", "True", *refused),
    )  # fmt: skip
    conditions = [
        {"type": kind, "status": status, "reason": reason, "message": words, "lastTransitionTime": when}
        for kind, status, reason, words in verdicts
    ]
    kept: Json = {name: value for name, value in before.items() if name != "pendingSince"}
    if "stageStatuses" in before:
        stages = items(before, "stageStatuses")
        kept["stageStatuses"] = [{**s, "state": "Pending"} if s.get("state") == "Running" else s for s in stages]
        kept["stages"] = {**cast("Json", before.get("stages", {})), "active": 0}
    types = {new["type"] for new in conditions}
    return {
        **kept,
        "phase": "Failed",
        "observedGeneration": generation,
        "completionTime": when,
        "conditions": [
            *(old for old in previous if old.get("type") not in types),
            *(
                {
                    **new,
                    "observedGeneration": generation,
                    "lastTransitionTime": _since(condition(previous, new["type"]), new),
                }
                for new in conditions
            ),
        ],
    }


def still(before: Json, generation: int) -> Json:
    """The status of a conversion that has ended, after another edit of its spec: as true of that one."""
    conditions = [{**old, "observedGeneration": generation} for old in items(before, "conditions")]
    return {**before, "observedGeneration": generation, "conditions": conditions}


def _since(old: Json, new: Mapping[str, object]) -> object:
    same = old.get("status") == new["status"] and "lastTransitionTime" in old
    return old["lastTransitionTime"] if same else new["lastTransitionTime"]


def _phase(status_input: StatusInput) -> str:
    if status_input.suspended is not None:
        return "Suspended" if status_input.suspended.reason == "UserRequested" else "Queued"
    begun = any(record.state != "Pending" or record.attempts for record in status_input.records)
    return "Running" if begun else "Pending"


def _conditions(status_input: StatusInput, found: Mapping[str, Json]) -> list[Json]:
    """Ours first, in the order in which they happen; then those of every run, with the reason that matters now."""
    when = found["Ready"]["lastTransitionTime"]
    over = status_input.finished is not None

    def condition_of(kind: str, verdict: Verdict) -> Json:
        status, reason, message = verdict
        return {
            "type": kind, "status": status, "reason": reason, "message": message[:MAX_MESSAGE], "lastTransitionTime": when,
        }  # fmt: skip

    waits = status_input.waits if status_input.suspended is None and not over else None
    degraded = status_input.degraded or (waits if waits and waits.reason in _TROUBLES else None)
    expected = _ENDED if over else ("AsExpected", "workers get on as expected")

    def blocker(seen: Blocker | None, reason: str, message: str) -> Verdict:
        return ("True", seen.reason, seen.message) if seen else ("False", reason, message)

    overridden_by_queue = status_input.overridden_by_queue or Blocker(reason="Resumed", message="it may go on")
    ours = [
        condition_of("Accepted", status_input.accepted),
        condition_of("VolumesReady", status_input.volumes),
        condition_of(
            "Suspended",
            blocker(None if over else status_input.suspended, overridden_by_queue.reason, overridden_by_queue.message),
        ),
        condition_of("Degraded", blocker(degraded, *expected)),
    ]
    if over:
        return [*ours, *found.values()]
    # What only somebody can change is reported before what a conversion waits for.
    worst = degraded if degraded and degraded.reason in _STALLED else None
    now = status_input.suspended or worst or waits or degraded
    if now is None:
        return [*ours, *found.values()]
    said: Json = {"reason": now.reason, "message": now.message[:MAX_MESSAGE]}
    theirs = {kind: {**c, **said} if kind in {"Ready", "Reconciling", "Stalled"} else c for kind, c in found.items()}
    if now.reason in _STALLED:
        # kstatus looks at Reconciling first, and would wait for ever.
        theirs["Stalled"]["status"], theirs["Reconciling"]["status"] = "True", "False"
    return [*ours, *theirs.values()]
