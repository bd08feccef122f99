"""A Job and its pods -> one record for each pipeline stage, and what stands in their way.  Pure.

A stage is done when a worker of it ended with exit code 0 and its termination message proves it; that a Job counts the
index as completed is not enough.  The Job says which indexes were given up, and the messages say why.  What was recorded
before stays, so a pod that is gone takes nothing with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, cast

from ckpt2pt.errors import FAILS_JOB, FAILS_STAGE, NOT_THE_SPEC
from ckpt2pt.kube.conversion.report import NO_REPORT, Report, clean, number, report_of, text, unproved
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import REASONS, WAITING, StageRecord, State
from ckpt2pt_operator.rules.views import Job, Pod, items

OUT_OF_MEMORY = "OOMKilled"
_LOST_AFTER = timedelta(seconds=90)
"""Longer than the grace of a worker: a pod that is still there has no kubelet to end it."""

_LOOKED_AT_AFTER = timedelta(seconds=30)
"""A scheduler that runs has bound a pod by then, or says why it cannot."""

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=10), timedelta(minutes=10)

REASON_WORDS = frozenset(
    {*REASONS.values(), *NOT_THE_SPEC, NO_REPORT, OUT_OF_MEMORY, "Evicted", "Killed", "PodDeleted"}
)
"""Every reason of a stage that is ours: a worker may write anything into its message."""

_FINAL = frozenset(REASONS[code] for code in FAILS_STAGE | FAILS_JOB) | NOT_THE_SPEC
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
class Blocker:
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
                iteration=number(item, "iteration") or None,
                verified=text(item, "verified"),
            )
    return found


def observed(
    conversion: Conversion,
    before: Mapping[int, StageRecord],
    job: Job | None,
    pods: Sequence[Pod],
    live: Mapping[str, Report],
) -> dict[int, StageRecord]:
    """``before``, brought up to date with a Job, its pods, and what running workers tell (by pod uid).

    Of a Job that is gone the pods alone tell, which may outlive it for a while.
    """
    workers: dict[int, list[Pod]] = {}
    for pod in pods:
        workers.setdefault(job.stage_of(pod.index) if job else pod.stage, []).append(pod)
    counted: dict[int, _Counted] = dict.fromkeys(workers, "")
    if job:
        counted |= {job.stage_of(index): _counted(job, index) for index in range(job.completions)}
    found = dict(before)
    for stage in counted.keys() & found.keys():
        found[stage] = _record(conversion, found[stage], counted[stage], workers.get(stage, ()), live)
    return found


_Counted = Literal["", "Lost", "Completed", "Failed"]
"""What a Job says of an index.  ``Lost`` is one that a Job that is over counts as completed."""


def _counted(job: Job, index: int) -> _Counted:
    if index in job.completed:
        return "Lost" if job.ending else "Completed"
    return "Failed" if index in job.failed else ""


def behind(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether what was seen of the pods is older than what the Job, which has ended, says of them."""
    succeeded = {pod.index for pod in pods if pod.phase == "Succeeded"}
    ended = {pod.index for pod in pods if pod.over}
    return bool(job.completed - succeeded or job.failed - ended or any(not pod.over for pod in pods))


def _record(
    conversion: Conversion, before: StageRecord, counted: _Counted, pods: Sequence[Pod], live: Mapping[str, Report]
) -> StageRecord:
    if before.state == "Succeeded":
        return before
    proved = [
        pod for pod in pods if pod.exit_code == 0 and not unproved(report_of(pod.report), conversion, before.stage)
    ]
    mute = [pod for pod in pods if pod.phase == "Succeeded"]
    # A replaced worker may have ended later than the one that did the work.
    last = max(proved or mute or pods, key=_recency, default=None)
    if last is None:
        return _unseen(before, counted)
    report = live.get(last.uid) if last.running else report_of(last.report)
    state: State = "Running" if last.running else "Pending"
    reason, message = cause(last, report) if last.over or last.finished else _underway(last, report, pods)
    if proved:
        state, reason, message = "Succeeded", "", ""
    elif mute:
        state, reason, message = "Failed", NO_REPORT, _mute(unproved(report, conversion, before.stage), last)
    elif counted == "Failed":
        state = "Failed"
    elif counted == "Lost":
        state, reason, message = "Pending", NO_REPORT, _LOST
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
        iteration=report.iteration if report and proved else None,
        verified=report.verified if report and proved else "",
    )


_LOST = "it ended with exit code 0, and its pod was gone before its report was read; a stage that is done is done again at no cost"


def _unseen(before: StageRecord, counted: _Counted) -> StageRecord:
    """A stage of whose workers nothing is there: what its Job counts is no proof."""
    if counted == "Failed":
        return replace(before, state="Failed")
    if counted == "Completed" or (counted == "Lost" and before.state == "Failed"):
        return before
    pending = replace(before, state="Pending")
    return replace(pending, reason=NO_REPORT, message=_LOST) if counted == "Lost" else pending


def _mute(lacking: str, pod: Pod) -> str:
    """Why an exit code of 0 was not believed, with the end of whatever stands in place of a report."""
    tail = _tail(pod)
    return f"{lacking}{f'; it left: {tail}' if tail and not report_of(pod.report) else ''}; see that spec.workers.image and podOverrides run ckpt2pt"


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
        return ("", "") if report and report.exit_code == 0 else (NO_REPORT, "exit code 0 without a report")
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
    return reason, f"exit code {pod.exit_code}: {_tail(pod) or 'it left no message'}"


def _tail(pod: Pod) -> str:
    """The last line of its termination message."""
    return clean(pod.report.strip().splitlines()[-1][-512:]) if pod.report.strip() else ""


# ----------------------------------------------------------------------------------------------------------- obstacles


def pod_obstacle(pods: Iterable[Pod], warnings: Mapping[str, str], now: datetime) -> Blocker | None:
    """The worst that keeps a pod from running; ``warnings`` are the newest warning events by uid."""
    found = [blocker for pod in pods if not pod.over and (blocker := _obstacle(pod, warnings, now))]
    order = ("ImagePullBackOff", "CreateContainerError", "VolumeMountFailed", "Unschedulable", "NodeLost")
    return min(found, key=lambda blocker: order.index(blocker.reason), default=None)


def refused_pods(job: Job, pods: Sequence[Pod], warnings: Mapping[str, str]) -> Blocker | None:
    """Why the API server refuses the pods of a Job, if it does."""
    message = warnings.get(job.uid)
    if message is None or any(not pod.over for pod in pods):
        return None
    if "failed quota" in message and "must specify" in message:
        message = f"{message}; set spec.workers.resources, or worker.defaults.resources in the values of the chart"
    return Blocker(reason="QuotaExceeded" if is_quota(message) else "PodRejected", message=message)


def is_quota(message: str) -> bool:
    """Whether a ResourceQuota refuses: what is asked for is too much, or not said (k8s.io/apiserver plugin resourcequota)."""
    return "exceeded quota" in message or "failed quota" in message


def stuck_since(job: Job, pods: Sequence[Pod], refused: Blocker | None) -> datetime | None:
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


def _obstacle(pod: Pod, warnings: Mapping[str, str], now: datetime) -> Blocker | None:
    if pod.deleted and now - pod.deleted <= _LOST_AFTER:
        return None  # it needs nothing more than to end
    if pod.deleted:
        return Blocker(
            reason="NodeLost",
            message=f"node {pod.node} does not end pod {pod.name}; bring it back, delete the Node, or taint it "
            "node.kubernetes.io/out-of-service:NoExecute, and what waits for it goes on",
        )
    waiting, message = pod.waiting
    if waiting in _WAITING:
        return Blocker(reason=_WAITING[waiting], message=f"pod {pod.name}: {waiting}: {message or 'no details'}")
    if pod.unscheduled:
        return Blocker(reason="Unschedulable", message=f"pod {pod.name}: {pod.unscheduled}")
    if not pod.node and pod.created and now - pod.created > _LOOKED_AT_AFTER:
        hint = "see that the scheduler of spec.workers.schedulerName runs"
        return Blocker(reason="Unschedulable", message=f"pod {pod.name}: no scheduler has looked at it; {hint}")
    if pod.uid in warnings and pod.started is None:
        return Blocker(reason="VolumeMountFailed", message=f"pod {pod.name}: {warnings[pod.uid]}")
    return None


def setback(conversion: Conversion, records: Iterable[StageRecord]) -> Blocker | None:
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
    tries = f"attempt {worst.attempts} of {conversion.spec.retries.per_stage + 1}"
    return Blocker(
        reason=worst.reason if worst.reason in known else "StageRetrying",
        message=f"stage {worst.stage}, {tries}: {worst.reason}: {worst.message}",
    )
