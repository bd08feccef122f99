"""Every way in which a conversion may stand, reached or not, as statuses of generation 3."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ckpt2pt.kube.conversion.report import NO_REPORT
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import WAITING, Ending, StageRecord
from ckpt2pt_operator.rules.conditions import StatusInput, refused_document, stamp, status_document, still
from ckpt2pt_operator.rules.seen import REFUSALS
from ckpt2pt_operator.rules.stages import Blocker
from simulation import START, conversion

DONE = StageRecord(stage=0, state="Succeeded", iteration=500, verified="Digest")
RECORDS = (
    StageRecord(stage=0), StageRecord(stage=0, state="Running", attempts=1), DONE,
    StageRecord(stage=0, state="Failed", reason=NO_REPORT, message="m"),
)  # fmt: skip
WAITS = (
    None, "PVCNotFound", "AccessModeConflict", "WaitingForTraining", "TrainingKindUnknown", "WaitingForPods", "Cancelling",
    "JobDeleted", WAITING, *sorted(REFUSALS),
)  # fmt: skip
DEGRADED = (
    None, "ImagePullBackOff", "CreateContainerError", "VolumeMountFailed", "Unschedulable", "NodeLost", "PodRejected",
    "QuotaExceeded", "StageRetrying", "OOMKilled", "PerIndexRetryUnsupported", "TrainingKindUnknown",
)  # fmt: skip
SUSPENDED = (None, "UserRequested", "QueuedByKueue", "Preempted")
ENDED = (None, "Cancelled", "PendingDeadline", "InvalidSpec", "TargetConflict", "IterationsDiffer")


def blocker(reason: str | None) -> Blocker | None:
    return Blocker(reason=reason, message=f"of {reason}") if reason else None


def standings() -> Iterator[StatusInput]:
    """Every way in which a conversion may stand, reached or not."""
    for record, waits, degraded, suspended in itertools.product(RECORDS, WAITS, DEGRADED, SUSPENDED):
        yield StatusInput(
            records=[record], waits=blocker(waits), degraded=blocker(degraded), suspended=blocker(suspended)
        )
    for record, degraded, ended in itertools.product(RECORDS, DEGRADED, ENDED):
        ending = Ending(reason=ended, message="m") if ended else None
        yield StatusInput(records=[record], degraded=blocker(degraded), ended=ending, finished=stamp(START))


def statuses() -> Iterator[Any]:
    kinds: list[list[tuple[str, object]]] = [[], [("spec.dryRun", True)], [("spec.follow", {})]]
    documents = [parse(conversion(*changes)) for changes in kinds]
    for document, status_input in itertools.product(documents, standings()):
        yield status_document(document, status_input, before={}, generation=3, now=START)
    for document in documents:
        begun = status_document(document, StatusInput(records=[RECORDS[1]]), before={}, generation=2, now=START)
        earlier: list[Any] = [{}, {"observedGeneration": -1}, begun]
        for before in earlier:
            yield refused_document("wrong", before=before, generation=3, now=START)
        over = status_document(
            document, StatusInput(records=[DONE], finished=stamp(START)), before={}, generation=2, now=START
        )
        yield still(over, 3)
