"""What a user does with a conversion that is there: retry, cancel, read a stage's log."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import cast

from ckpt2pt.cluster.api import Api, ApiError, Json, explained
from ckpt2pt.cluster.submit import Submitted
from ckpt2pt.conversion.job import ATTEMPT_LABEL, CONTAINER, STAGES_ANNOTATION
from ckpt2pt.conversion.status import TERMINAL
from ckpt2pt.errors import MissingInputError, UsageError

RETRY_ANNOTATION = "ckpt2pt.dev/retry"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def retry(api: Api, there: Submitted) -> None:
    """Have the failed stages tried again; UsageError where nothing has failed."""
    phase = _phase(_get(api, there, "retrying it"))
    if phase != "Failed":
        mend = "wait until it has ended" if phase not in TERMINAL else "make a new CheckpointConversion"
        raise UsageError(f"it is {phase}, and only what has Failed is tried again", where=_name(there), mend=mend)
    _patch(api, there, {"metadata": {"annotations": {RETRY_ANNOTATION: secrets.token_hex(4)}}}, "retrying it")


def cancel(api: Api, there: Submitted) -> None:
    """Stop it for good; what is finished stays on the volume.  UsageError where it has ended."""
    phase = _phase(_get(api, there, "cancelling it"))
    if phase in TERMINAL:
        raise UsageError(f"it is {phase} already", where=_name(there), mend="delete it, if it is to go")
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
    spec = cast("Json", _get(api, there, "reading its log").get("spec") or {})
    stages = cast("Json", spec.get("parallelism") or {}).get("pipeline") or 1
    if isinstance(stages, int) and stage >= stages:
        known = f"stages 0 to {stages - 1}" if stages > 1 else "stage 0 alone"
        raise UsageError(f"there is no stage {stage}", where=_name(there), mend=f"it has {known}; name one of them")
    stage = 0 if "follow" in spec or spec.get("dryRun") is True else stage
    chosen = f"app.kubernetes.io/name=ckpt2pt,app.kubernetes.io/instance={there.name}"
    try:
        jobs = _items(api.json("GET", f"/apis/batch/v1/namespaces/{there.namespace}/jobs", labelSelector=chosen))
        pods = _items(api.json("GET", f"/api/v1/namespaces/{there.namespace}/pods", labelSelector=chosen))
        pod = newest_pod(jobs, pods, stage)
        if pod is None:
            mend = "wait until it runs; pods are gone when the Job's time to live is over"
            raise MissingInputError("there is no pod", where=where, mend=mend)
        path = f"/api/v1/namespaces/{there.namespace}/pods/{pod}/log"
        return api.text("GET", path, container=CONTAINER)
    except ApiError as error:
        raise explained(error, "reading its log", where) from error


def newest_pod(jobs: Iterable[Json], pods: Iterable[Json], stage: int) -> str | None:
    """The last pod that worked on a stage; a later attempt numbers its indexes by the stages that it does."""
    stages: dict[str, list[int]] = {}
    for job in jobs:
        listed = _text(job, "annotations", STAGES_ANNOTATION)
        stages[_text(job, "labels", ATTEMPT_LABEL)] = [int(part) for part in listed.split(",") if part.isdecimal()]
    found: list[tuple[str, str]] = []
    for pod in pods:
        index, attempt = _text(pod, "labels", INDEX_LABEL), _text(pod, "labels", ATTEMPT_LABEL)
        if index.isdecimal():
            does = stages.get(attempt) or list(range(int(index) + 1))
            if int(index) < len(does) and does[int(index)] == stage:
                metadata = cast("Json", pod["metadata"])
                found.append((str(metadata.get("creationTimestamp", "")), str(metadata["name"])))
    return max(found)[1] if found else None


def _text(item: Json, where: str, name: str) -> str:
    metadata = cast("Json", item.get("metadata") or {})
    return str(cast("Json", metadata.get(where) or {}).get(name, ""))


def _items(listing: Json) -> list[Json]:
    return cast("list[Json]", listing.get("items") or [])
