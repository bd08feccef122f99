"""What the operator keeps of a Job and of a pod: a dozen fields each.  Pure.

Thousands of pods are held in memory, and nothing that comes from them is trusted: texts are cut and stripped of
control characters, because they end in the status and on terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from ckpt2pt.kube.conversion.job import CONTAINER, MANAGER, STAGES_ANNOTATION, UID_LABEL
from ckpt2pt.kube.conversion.report import MAX_REPORT, child, clean, number, text, word
from ckpt2pt.kube.conversion.schema import Json

_INDEX = "batch.kubernetes.io/job-completion-index"
_FAILURES = "batch.kubernetes.io/job-index-failure-count"
_IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
_MOST_TRIES = (1 << 31) - 1
_MOST_INDEXES = 100_000
_MAX_DIGITS = 18
_NOTHING: Json = {}


def items(value: Mapping[str, object], name: str) -> list[Json]:
    """The objects in a list."""
    found = value.get(name)
    return (
        [cast("Json", item) for item in cast("list[object]", found) if isinstance(item, Mapping)]
        if isinstance(found, list)
        else []
    )


def texts(value: Mapping[str, object], name: str) -> tuple[str, ...]:
    """The texts in a list."""
    found = value.get(name)
    given = cast("list[object]", found) if isinstance(found, list) else []
    return tuple(clean(each) for each in given if isinstance(each, str))


def time(value: Mapping[str, object], name: str) -> datetime | None:
    """A time of an API server, in UTC; None where it has no zone, or is none of the years that Python counts."""
    found = value.get(name)
    if not isinstance(found, str):
        return None
    try:
        moment = datetime.fromisoformat(found)
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def indexes(intervals: str) -> frozenset[int]:
    """``0-2,4`` is {0, 1, 2, 4}."""
    found: set[int] = set()
    for part in filter(None, intervals.split(",")):
        first, _, last = part.partition("-")
        if _is_index(first) and _is_index(last or first):
            found.update(range(int(first), min(int(last or first), _MOST_INDEXES) + 1))
    return frozenset(found)


def _is_index(word: str) -> bool:
    """Short enough for ``int``, which refuses thousands of digits."""
    return word.isdecimal() and len(word) <= _MAX_DIGITS


def condition(conditions: list[Json], kind: str) -> Json:
    """The condition of that type; an empty object where there is none."""
    return next((item for item in conditions if item.get("type") == kind), _NOTHING)


def _stages(annotations: Json) -> tuple[int, ...] | None:
    """Those of a Job that does not do all of them; None stands for all in order."""
    stages = text(annotations, STAGES_ANNOTATION, 8192)
    return tuple(int(stage) for stage in stages.split(",") if _is_index(stage)) if stages else None


def _stage_of(stages: tuple[int, ...] | None, index: int) -> int:
    return index if stages is None else stages[index] if index < len(stages) else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One worker: ``index`` is its completion index, ``failures`` how often that index failed before it.

    ``owner`` is the conversion that its label names; ``job`` and ``job_uid`` are the Job that controls it, if one does.
    ``stages`` is as of that Job, which may be gone; ``gone`` is a pod that was deleted, as it was seen last.
    """

    name: str
    namespace: str
    uid: str
    version: str
    job: str
    job_uid: str
    owner: str
    index: int
    stages: tuple[int, ...] | None
    phase: str
    reason: str
    message: str
    node: str
    ip: str
    created: datetime | None
    deleted: datetime | None
    unscheduled: str
    disruption: str
    waiting: tuple[str, str]
    started: datetime | None
    finished: datetime | None
    exit_code: int | None
    ending: str
    report: str
    failures: int
    disruptions: int
    gone: bool = False

    @property
    def stage(self) -> int:
        """The pipeline stage that it converts."""
        return _stage_of(self.stages, self.index)

    @property
    def over(self) -> bool:
        """It has ended, and nothing of it runs any more."""
        return self.phase in {"Succeeded", "Failed"}

    @property
    def running(self) -> bool:
        """Its container has been started and has not ended."""
        return not self.over and self.started is not None and self.finished is None


def pod_view(raw: Json) -> Pod:
    """A pod as an API server gives it."""
    meta, spec, status = child(raw, "metadata"), child(raw, "spec"), child(raw, "status")
    labels, annotations = child(meta, "labels"), child(meta, "annotations")
    controller = _controller(meta)
    controller = (
        controller if (controller.get("apiVersion"), controller.get("kind")) == ("batch/v1", "Job") else _NOTHING
    )
    conditions = items(status, "conditions")
    container = next((item for item in items(status, "containerStatuses") if item.get("name") == CONTAINER), _NOTHING)
    state = child(container, "state")
    ended = child(state, "terminated") or child(container, "lastState", "terminated")
    waiting, scheduled, disruption = (
        child(state, "waiting"), condition(conditions, "PodScheduled"), condition(conditions, "DisruptionTarget"),
    )  # fmt: skip
    return Pod(
        name=text(meta, "name"),
        namespace=text(meta, "namespace"),
        uid=text(meta, "uid"),
        version=text(meta, "resourceVersion"),
        job=text(controller, "name"),
        job_uid=text(controller, "uid"),
        owner=text(labels, UID_LABEL),
        index=number(labels if _INDEX in labels else annotations, _INDEX),
        stages=_stages(annotations),
        phase=text(status, "phase"),
        reason=word(status, "reason"),
        message=text(status, "message"),
        node=text(spec, "nodeName"),
        ip=text(status, "podIP"),
        created=time(meta, "creationTimestamp"),
        deleted=time(meta, "deletionTimestamp"),
        unscheduled=text(scheduled, "message") or "not yet" if scheduled.get("status") == "False" else "",
        disruption=text(disruption, "reason") or "Disrupted" if disruption.get("status") == "True" else "",
        waiting=(text(waiting, "reason"), text(waiting, "message")),
        started=time(child(state, "running"), "startedAt") or time(ended, "startedAt"),
        finished=time(ended, "finishedAt"),
        exit_code=number(ended, "exitCode", -1) if ended else None,
        ending=text(ended, "reason"),
        report=str(ended.get("message", ""))[:MAX_REPORT],
        failures=min(number(annotations, _FAILURES), _MOST_TRIES - 1),
        disruptions=min(number(annotations, _IGNORED), _MOST_TRIES),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt: ``stages[i]`` is what completion index i does; None stands for all of them in order."""

    name: str
    namespace: str
    uid: str
    version: str
    owner: str
    attempt: int
    stages: tuple[int, ...] | None
    created: datetime | None
    deleted: bool
    started: datetime | None
    completed_at: datetime | None
    suspended: bool
    queued: bool
    ours: bool
    parallelism: int
    completions: int
    backoff_limit: int
    active: int
    completed: frozenset[int]
    failed: frozenset[int]
    ending: str
    reason: str
    message: str
    ttl: int | None
    per_index: bool

    def stage_of(self, index: int) -> int:
        """The pipeline stage that a completion index converts."""
        return _stage_of(self.stages, index)


def job_view(raw: Json) -> Job:
    """A Job as an API server gives it."""
    meta, spec, status = child(raw, "metadata"), child(raw, "spec"), child(raw, "status")
    labels, name = child(meta, "labels"), text(meta, "name")
    conditions = [item for item in items(status, "conditions") if item.get("status") == "True"]
    end = condition(conditions, "Complete") or condition(conditions, "Failed")
    return Job(
        name=name,
        namespace=text(meta, "namespace"),
        uid=text(meta, "uid"),
        version=text(meta, "resourceVersion"),
        owner=text(_controller(meta), "uid"),
        attempt=number({"number": name.rpartition("-")[2]}, "number", 1),  # as job_name made it; a label is anybody's
        stages=_stages(child(meta, "annotations")),
        created=time(meta, "creationTimestamp"),
        deleted="deletionTimestamp" in meta,
        started=time(status, "startTime"),
        completed_at=time(status, "completionTime") or time(end, "lastTransitionTime"),
        suspended=spec.get("suspend") is True,
        queued="kueue.x-k8s.io/queue-name" in labels,
        ours=labels.get("app.kubernetes.io/managed-by") == MANAGER,
        parallelism=number(spec, "parallelism", 1),
        completions=number(spec, "completions", 1),
        backoff_limit=number(spec, "backoffLimit", 6),
        active=number(status, "active"),
        completed=indexes(text(status, "completedIndexes", 8192)),
        failed=indexes(text(status, "failedIndexes", 8192)),
        ending=text(end, "type"),
        reason=word(end, "reason"),
        message=text(end, "message"),
        ttl=number(spec, "ttlSecondsAfterFinished") if "ttlSecondsAfterFinished" in spec else None,
        per_index="backoffLimitPerIndex" in spec,
    )


def is_of(thing: Job | Pod, namespace: str, name: str) -> bool:
    """Whether a Job, or the Job of a pod, can be one that was made for that conversion: a label can be written by anybody.

    A pod that names a Job that is not there, or is another one, is deleted by the garbage collector; one that names a Job
    that is there is counted by the Job controller itself.
    """
    job = thing.job if isinstance(thing, Pod) else thing.name
    return thing.namespace == namespace and job.rpartition("-")[0] == name


def _controller(meta: Json) -> Json:
    """The owner that manages an object; an empty object where there is none."""
    return next((item for item in items(meta, "ownerReferences") if item.get("controller") is True), _NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A PersistentVolumeClaim."""

    phase: str
    modes: frozenset[str]


def claim_view(raw: Json) -> Claim:
    """A claim as an API server gives it."""
    modes = child(raw, "status").get("accessModes") or child(raw, "spec").get("accessModes") or ()
    return Claim(phase=text(child(raw, "status"), "phase"), modes=frozenset(map(str, cast("Sequence[object]", modes))))


def warning_view(raw: Json) -> tuple[str, str] | None:
    """When a warning event was last seen, and what it says, where it tells why a worker cannot start."""
    if text(raw, "reason") not in {"FailedCreate", "FailedMount", "FailedAttachVolume"}:
        return None
    return text(raw, "lastTimestamp") or text(raw, "eventTime"), text(raw, "message", 700)
