"""What a user does with a conversion that is there: retry, cancel, read a stage's log."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import cast

from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.kube.cluster.api import Api, ApiError, Json, explained
from ckpt2pt.kube.cluster.submit import Submitted
from ckpt2pt.kube.conversion.job import CONTAINER, STAGES_ANNOTATION
from ckpt2pt.kube.conversion.names import request_path
from ckpt2pt.kube.conversion.status import TERMINAL

RETRY_ANNOTATION = "ckpt2pt.dev/retry"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def retry(api: Api, there: Submitted) -> None:
    """Have the failed stages tried again; UsageError where nothing has failed."""
    phase = _phase(_get(api, there, "retrying it"))
    if phase != "Failed":
        hint = "wait until it has ended" if phase not in TERMINAL else "make a new CheckpointConversion"
        raise UsageError(f"it is {phase}, and only what has Failed is tried again", where=_name(there), hint=hint)
    _patch(api, there, {"metadata": {"annotations": {RETRY_ANNOTATION: secrets.token_hex(4)}}}, "retrying it")


def cancel(api: Api, there: Submitted) -> None:
    """Stop it for good; what is finished stays on the volume.  UsageError where it has ended."""
    phase = _phase(_get(api, there, "cancelling it"))
    if phase in TERMINAL:
        raise UsageError(f"it is {phase} already", where=_name(there), hint="delete it, if it is to go")
    _patch(api, there, {"spec": {"cancel": True}}, "cancelling it")


def _name(there: Submitted) -> str:
    return f"CheckpointConversion {there.namespace}/{there.name}"


def _phase(document: Json) -> str:
    return str(cast("Json", document.get("status") or {}).get("phase") or "Pending")


def _get(api: Api, there: Submitted, what: str) -> Json:
    try:
        return api.json("GET", there.path)
    except ApiError as error:
        raise explained(error, what, _name(there)) from error


def _patch(api: Api, there: Submitted, change: Json, what: str) -> None:
    try:
        api.json("PATCH", there.path, change)
    except ApiError as error:
        raise explained(error, what, _name(there)) from error


def log_of_stage(api: Api, there: Submitted, stage: int) -> str:
    """What the newest worker of a stage has written; the one worker of a follower or a dry run has all stages.

    UsageError where the conversion has no such stage, MissingInputError where no worker of it is there.
    """
    where = f"stage {stage} of {_name(there)}"
    conversion = _get(api, there, "reading its log")
    spec = cast("Json", conversion.get("spec") or {})
    uid = str(cast("Json", conversion.get("metadata") or {}).get("uid", ""))
    result = cast("Json", cast("Json", spec.get("target") or {}).get("parallelism") or {})
    stages = result.get("pipeline") or cast("Json", spec.get("parallelism") or {}).get("pipeline") or 1
    if isinstance(stages, int) and stage >= stages:
        known = f"stages 0 to {stages - 1}" if stages > 1 else "stage 0 alone"
        raise UsageError(f"there is no stage {stage}", where=_name(there), hint=f"it has {known}; name one of them")
    stage = 0 if "follow" in spec or spec.get("dryRun") is True else stage
    chosen = f"app.kubernetes.io/name=ckpt2pt,app.kubernetes.io/instance={there.name}"
    try:
        jobs = _items(api.json("GET", request_path("apis/batch/v1", there.namespace, "jobs"), labelSelector=chosen))
        pods = _items(api.json("GET", request_path("api/v1", there.namespace, "pods"), labelSelector=chosen))
        pod = newest_pod(uid, jobs, pods, stage)
        if pod is None:
            hint = "wait until it runs; pods are gone when the Job's time to live is over"
            raise MissingInputError("there is no pod", where=where, hint=hint)
        path = request_path("api/v1", there.namespace, "pods", pod, "log")
        return api.text("GET", path, container=CONTAINER)
    except ApiError as error:
        raise explained(error, "reading its log", where) from error


def newest_pod(uid: str, jobs: Iterable[Json], pods: Iterable[Json], stage: int) -> str | None:
    """The last pod that worked on a stage of the conversion with that uid; a later attempt numbers its indexes by the
    stages that it does.  Owners are looked at: anybody can write the labels.
    """
    stages: dict[str, list[int]] = {}
    for job in jobs:
        if _controller(job) == uid:
            listed = _text(job, "annotations", STAGES_ANNOTATION)
            stages[str(cast("Json", job["metadata"])["uid"])] = [
                int(part) for part in listed.split(",") if part.isdecimal()
            ]
    found: list[tuple[str, str]] = []
    for pod in pods:
        index, job_uid = _text(pod, "labels", INDEX_LABEL), _controller(pod)
        if index.isdecimal() and job_uid in stages:
            does = stages[job_uid] or list(range(int(index) + 1))
            if int(index) < len(does) and does[int(index)] == stage:
                metadata = cast("Json", pod["metadata"])
                found.append((str(metadata.get("creationTimestamp", "")), str(metadata["name"])))
    return max(found)[1] if found else None


def _controller(item: Json) -> str:
    """The uid of the owner that manages an object; empty where there is none."""
    owners = cast("list[Json]", cast("Json", item.get("metadata") or {}).get("ownerReferences") or [])
    return next((str(owner.get("uid", "")) for owner in owners if owner.get("controller") is True), "")


def _text(item: Json, where: str, name: str) -> str:
    metadata = cast("Json", item.get("metadata") or {})
    return str(cast("Json", metadata.get(where) or {}).get(name, ""))


def _items(listing: Json) -> list[Json]:
    return cast("list[Json]", listing.get("items") or [])
