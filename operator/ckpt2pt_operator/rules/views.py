"""What the operator keeps of a Job and of a pod: a dozen fields each.  Pure.

Thousands of pods are held in memory, and nothing that comes from them is trusted: texts are cut and stripped of
control characters, because they end in the status and on terminals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from ckpt2pt.conversion.job import CONTAINER, MANAGER, STAGES_ANNOTATION, UID_LABEL
from ckpt2pt.conversion.spec import Json
from ckpt2pt.conversion.status import MAX_MESSAGE

_INDEX = "batch.kubernetes.io/job-completion-index"
_FAILURES = "batch.kubernetes.io/job-index-failure-count"
_IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
_MAX_REPORT = 12 << 10
_MOST = 1 << 63
_MOST_BYTES = 1 << 50
"""Of one stage: the sum of 1024 of them fits into 64 bits."""
_MOST_TRIES = (1 << 31) - 1
_MOST_INDEXES = 100_000
_MAX_DIGITS = 18
_NOTHING: Json = {}


def child(value: Mapping[str, object], *names: str) -> Json:
    """The object below ``names``; an empty one where there is none."""
    found: object = value
    for name in names:
        found = cast("Json", found).get(name) if isinstance(found, Mapping) else None
    return cast("Json", found) if isinstance(found, Mapping) else {}


def items(value: Mapping[str, object], name: str) -> list[Json]:
    """The objects in a list."""
    found = value.get(name)
    return (
        [cast("Json", item) for item in cast("list[object]", found) if isinstance(item, Mapping)]
        if isinstance(found, list)
        else []
    )


def text(value: Mapping[str, object], name: str, limit: int = MAX_MESSAGE) -> str:
    """A string without control characters."""
    found = value.get(name)
    return clean(found, limit) if isinstance(found, str) else ""


def clean(found: str, limit: int = MAX_MESSAGE) -> str:
    """At most ``limit`` printable characters on one line."""
    return "".join(char if char.isprintable() else " " for char in found[: limit * 4])[:limit].strip()


def word(value: Mapping[str, object], name: str) -> str:
    """A reason in CamelCase; empty where it is anything else."""
    found = text(value, name, 128)
    return found if re.fullmatch(r"[A-Z][A-Za-z0-9]*", found) else ""


def number(value: Mapping[str, object], name: str, default: int = 0) -> int:
    """A whole number that is not negative and fits into 64 bits; a fraction is cut off."""
    found = value.get(name)
    if isinstance(found, str) and found.isdecimal() and len(found) < len(str(_MOST)):
        found = int(found)
    if isinstance(found, float) and 0 <= found < _MOST:
        found = int(found)
    return found if type(found) is int and 0 <= found < _MOST else default


def time(value: Mapping[str, object], name: str) -> datetime | None:
    """A time of an API server, with its zone."""
    found = value.get(name)
    if not isinstance(found, str):
        return None
    try:
        moment = datetime.fromisoformat(found)
    except ValueError:
        return None
    return moment if moment.tzinfo else None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a dry run has found: what would be written, and what it would need.  Numbers of bytes, but for the files.

    ``free`` is None where the file system does not tell.
    """

    files: int
    written: int
    free: int | None
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker says of itself: in its termination message, or while it runs.  Numbers of bytes; None is unknown."""

    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    done: int = 0
    total: int | None = None
    throughput: int = 0
    iteration: int | None = None
    preview: Preview | None = None


def report_of(message: str) -> Report | None:
    """Read a report; None where it is not one, as when a worker was killed and the kubelet took its log instead."""
    if len(message) > _MAX_REPORT:
        return None
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    value = cast("Json", found)
    if value.get("version") != 1:
        return None
    return Report(
        exit_code=number(value, "exitCode", -1) if "exitCode" in value else None,
        reason=word(value, "reason"),
        message=text(value, "message"),
        done=min(number(value, "bytes"), _MOST_BYTES),
        total=min(number(value, "bytesTotal"), _MOST_BYTES) or None,
        throughput=min(number(value, "throughput"), _MOST_BYTES),
        iteration=number(value, "iteration") if "iteration" in value else None,
        preview=_preview_of(child(value, "plan")) if "plan" in value else None,
    )


def _preview_of(plan: Json) -> Preview:
    return Preview(
        files=number(plan, "files"),
        written=min(number(plan, "bytes"), _MOST_BYTES),
        free=min(number(plan, "freeSpace"), _MOST_BYTES) if "freeSpace" in plan else None,
        memory=min(number(plan, "memory"), _MOST_BYTES),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One worker: ``index`` is its completion index, ``failures`` how often that index failed before it.

    ``owner`` is the conversion that its label names; ``job`` and ``job_uid`` are the Job that controls it, if one does.
    """

    name: str
    namespace: str
    uid: str
    version: str
    job: str
    job_uid: str
    owner: str
    index: int
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
        report=str(ended.get("message", ""))[:_MAX_REPORT],
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
        return index if self.stages is None else self.stages[index] if index < len(self.stages) else -1


def job_view(raw: Json) -> Job:
    """A Job as an API server gives it."""
    meta, spec, status = child(raw, "metadata"), child(raw, "spec"), child(raw, "status")
    labels, name = child(meta, "labels"), text(meta, "name")
    conditions = [item for item in items(status, "conditions") if item.get("status") == "True"]
    end = condition(conditions, "Complete") or condition(conditions, "Failed")
    stages = text(child(meta, "annotations"), STAGES_ANNOTATION, 8192)
    return Job(
        name=name,
        namespace=text(meta, "namespace"),
        uid=text(meta, "uid"),
        version=text(meta, "resourceVersion"),
        owner=text(_controller(meta), "uid"),
        attempt=number({"number": name.rpartition("-")[2]}, "number", 1),  # as job_name made it; a label is anybody's
        stages=tuple(int(stage) for stage in stages.split(",") if _is_index(stage)) if stages else None,
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
