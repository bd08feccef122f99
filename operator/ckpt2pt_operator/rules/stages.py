"""A Job and its pods -> one record for each pipeline stage, and what stands in their way.  Pure.

The Job says which indexes are done and which were given up; pods and their termination messages say why.  What was
recorded before stays, so a pod that is gone takes nothing with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import cast

from ckpt2pt.conversion.spec import Conversion, Json
from ckpt2pt.conversion.status import REASONS, WAITING, StageRecord, State
from ckpt2pt.errors import FAILS_JOB, FAILS_STAGE
from ckpt2pt_operator.rules.views import Job, Pod, Report, items, number, report_of, text

OUT_OF_MEMORY = "OOMKilled"
_LOST_AFTER = timedelta(seconds=90)
"""Longer than the grace of a worker: a pod that is still there has no kubelet to end it."""

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=10), timedelta(minutes=10)

REASON_WORDS = frozenset({*REASONS.values(), OUT_OF_MEMORY, "Evicted", "Killed", "PodDeleted"})
"""Every reason of a stage that is ours: a worker may write anything into its message."""

_FINAL = frozenset(REASONS[code] for code in FAILS_STAGE | FAILS_JOB)
"""What is not tried again: the Job is about to say so."""

_WAITING = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "ImagePullBackOff",
    "ErrImageNeverPull": "ImagePullBackOff",
    "RegistryUnavailable": "ImagePullBackOff",
    "CreateContainerConfigError": "CreateContainerError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "CreateContainerError",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """What keeps a conversion from going on as it should: the reason and message of a condition."""

    reason: str
    message: str


def recorded(status: Json, total: int) -> dict[int, StageRecord]:
    """The records of the status as it was written last; a stage that is not in it is pending."""
    found = {stage: StageRecord(stage=stage) for stage in range(total)}
    for item in items(status, "stageStatuses"):
        stage, state = number(item, "stage", -1), text(item, "state")
        if stage in found and state in {"Pending", "Running", "Succeeded", "Failed"}:
            found[stage] = StageRecord(
                stage=stage,
                state=cast("State", state),
                reason=text(item, "reason"),
                message=text(item, "message"),
                done=number(item, "bytes"),
                total=number(item, "bytesTotal") or None,
                throughput=number(item, "throughput"),
                attempts=number(item, "attempts"),
                disruptions=number(item, "disruptions"),
                node=text(item, "node"),
            )
    return found


def observed(
    before: Mapping[int, StageRecord], job: Job, pods: Sequence[Pod], live: Mapping[str, Report]
) -> dict[int, StageRecord]:
    """``before``, brought up to date with a Job, its pods, and what running workers tell (by pod uid)."""
    found = dict(before)
    workers: dict[int, list[Pod]] = {}
    for pod in pods:
        workers.setdefault(pod.index, []).append(pod)
    for index in range(job.completions):
        stage = job.stage_of(index)
        if stage in found:
            found[stage] = _record(found[stage], job, index, workers.get(index, ()), live)
    return found


def behind(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether what was seen of the pods is older than what the Job, which has ended, says of them."""
    told = {pod.index for pod in pods if pod.phase == "Succeeded"}
    ended = {pod.index for pod in pods if pod.over}
    return bool(job.completed - told or job.failed - ended or any(not pod.over for pod in pods))


def _record(before: StageRecord, job: Job, index: int, pods: Sequence[Pod], live: Mapping[str, Report]) -> StageRecord:
    last = max(pods, key=_recency, default=None)
    if index in job.completed:
        # A replaced worker may have ended later than the one that did the work.
        last = max((pod for pod in pods if pod.phase == "Succeeded"), key=_recency, default=last)
        state: State = "Succeeded"
    elif index in job.failed:
        state = "Failed"
    else:
        state = "Running" if last is not None and last.running else "Pending"
    if last is None:
        done = state == "Succeeded"
        return replace(
            before, state=state, reason="" if done else before.reason, message="" if done else before.message
        )
    report = live.get(last.uid) if last.running else report_of(last.report)
    reason, message = cause(last, report) if last.over or last.finished else _underway(last, report, pods)
    if state == "Succeeded":
        reason, message = "", ""
    return replace(
        before,
        state=state,
        reason=reason,
        message=message,
        node=last.node or before.node,
        attempts=max(before.attempts, last.failures + (last.started is not None)),
        disruptions=max(before.disruptions, last.disruptions, sum(bool(pod.disruption) for pod in pods)),
        done=report.done if report else before.done,
        total=(report.total if report else None) or before.total,
        throughput=report.throughput if report else before.throughput,
    )


def _recency(pod: Pod) -> tuple[int, float, bool]:
    return (pod.failures, pod.created.timestamp() if pod.created else 0.0, not pod.over)


def _underway(pod: Pod, report: Report | None, pods: Sequence[Pod]) -> tuple[str, str]:
    """Why a worker was started again, if it was; what it waits for, if it says so."""
    if report and report.reason:
        return report.reason, report.message
    earlier = max((other for other in pods if other.over and other is not pod), key=_recency, default=None)
    return cause(earlier, report_of(earlier.report)) if earlier else ("", "")


def cause(pod: Pod, report: Report | None) -> tuple[str, str]:
    """Why a worker ended, as reason and message; both empty where it did what it should."""
    if pod.phase == "Succeeded" or (pod.exit_code == 0 and not pod.disruption):
        return "", ""
    if pod.ending == OUT_OF_MEMORY:
        return OUT_OF_MEMORY, "the worker needed more memory than its limit; raise spec.workers.resources.limits.memory"
    if pod.disruption:
        return "Evicted", f"{pod.disruption}: {pod.message or 'the pod had to leave its node'}; it costs no attempt"
    if report and report.message:
        return report.reason or REASONS.get(report.exit_code or -1, "Failed"), report.message
    if pod.reason:
        return pod.reason, pod.message
    if pod.exit_code is None:
        return "PodDeleted", "the pod was deleted before its worker ended"
    reason = REASONS.get(pod.exit_code, "Killed" if pod.exit_code > 128 else "Failed")
    tail = pod.report.strip().splitlines()[-1][-512:] if pod.report.strip() else "it left no message"
    return reason, text({"": f"exit code {pod.exit_code}: {tail}"}, "")


# ----------------------------------------------------------------------------------------------------------- obstacles


def pod_obstacle(pods: Iterable[Pod], warnings: Mapping[str, str], now: datetime) -> Obstacle | None:
    """The worst that keeps a pod from running; ``warnings`` are the newest warning events by uid."""
    found = [obstacle for pod in pods if not pod.over and (obstacle := _obstacle(pod, warnings, now))]
    order = ("ImagePullBackOff", "CreateContainerError", "VolumeMountFailed", "Unschedulable", "NodeLost")
    return min(found, key=lambda obstacle: order.index(obstacle.reason), default=None)


def refused_pods(job: Job, pods: Sequence[Pod], warnings: Mapping[str, str]) -> Obstacle | None:
    """Why the API server refuses the pods of a Job, if it does."""
    message = warnings.get(job.uid)
    if message is None or any(not pod.over for pod in pods):
        return None
    return Obstacle(reason="QuotaExceeded" if "exceeded quota" in message else "PodRejected", message=message)


def stuck_since(job: Job, pods: Sequence[Pod], refused: Obstacle | None) -> datetime | None:
    """Since when no worker could start; None while one runs, and between two tries unless pods are refused."""
    if any(pod.running for pod in pods) or (pods and not refused and all(pod.over for pod in pods)):
        return None
    if job.started is None:
        return None  # its controller has not begun, or not again after it was suspended: no pod is late yet
    return max([job.started, *(free for pod in pods if (pod.over or pod.finished) and (free := _free_again(pod)))])


def _free_again(pod: Pod) -> datetime | None:
    """When the Job controller may fill the place of a pod that is over.

    Of a failed one it waits for 10 s, twice as long each time the index fails, 10 min at most (kubernetes v1.32
    pkg/controller/job/backoff_utils.go, getRemainingTimePerIndex).
    """
    ended = pod.finished or pod.deleted or pod.created
    if ended is None or pod.phase == "Succeeded":
        return ended
    return ended + min(_FIRST_PAUSE * (1 << min(pod.failures + pod.disruptions, 16)), _LONGEST_PAUSE)


def _obstacle(pod: Pod, warnings: Mapping[str, str], now: datetime) -> Obstacle | None:
    if pod.deleted and now - pod.deleted <= _LOST_AFTER:
        return None  # it needs nothing more than to end
    if pod.deleted:
        return Obstacle(
            reason="NodeLost",
            message=f"node {pod.node} does not end pod {pod.name}; bring it back, delete the Node, or taint it "
            "node.kubernetes.io/out-of-service:NoExecute, and what waits for it goes on",
        )
    waiting, message = pod.waiting
    if waiting in _WAITING:
        return Obstacle(reason=_WAITING[waiting], message=f"pod {pod.name}: {waiting}: {message or 'no details'}")
    if pod.unscheduled:
        return Obstacle(reason="Unschedulable", message=f"pod {pod.name}: {pod.unscheduled}")
    if pod.uid in warnings and pod.started is None:
        return Obstacle(reason="VolumeMountFailed", message=f"pod {pod.name}: {warnings[pod.uid]}")
    return None


def setback(conversion: Conversion, records: Iterable[StageRecord]) -> Obstacle | None:
    """A stage that did not go well the first time and is tried again."""
    again = [
        record
        for record in records
        if record.state in {"Pending", "Running"} and record.reason and record.reason not in _FINAL | {WAITING}
        if record.attempts or record.disruptions
    ]
    if not again:
        return None
    worst = next((record for record in again if record.reason == OUT_OF_MEMORY), again[0])
    known = {OUT_OF_MEMORY, "Evicted"}
    tries = f"attempt {worst.attempts} of {conversion.retries.per_stage + 1}"
    return Obstacle(
        reason=worst.reason if worst.reason in known else "StageRetrying",
        message=f"stage {worst.stage}, {tries}: {worst.reason}: {worst.message}",
    )
