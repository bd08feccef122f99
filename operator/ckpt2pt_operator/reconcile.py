"""Look at one conversion: gather what is known, let ``rules.plan`` decide, and obey.

The status is written first, and only if it says something new; actions come after it.  An error of the API server ends
the look, and the queue brings the conversion back later: nothing is lost, because everything is decided anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, cast

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.report import Report, child, number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.status import TERMINAL
from ckpt2pt_operator.api import CLAIMS, CONVERSIONS, EVENTS, JOBS, PODS, Api, ApiError
from ckpt2pt_operator.informer import pages
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.progress import Progress
from ckpt2pt_operator.recorder import Recorder
from ckpt2pt_operator.rules.awaits import awaited
from ckpt2pt_operator.rules.conditions import follows
from ckpt2pt_operator.rules.kept import Key, key_of, slim
from ckpt2pt_operator.rules.notes import Note, notes
from ckpt2pt_operator.rules.plan import conversion_of, plan
from ckpt2pt_operator.rules.seen import (
    Action,
    CreateJob,
    DeleteConversion,
    DeleteJob,
    OperatorDefaults,
    PatchJob,
    Plan,
    Refusal,
    Seen,
    Training,
    wants_warnings,
)
from ckpt2pt_operator.rules.stages import behind, is_quota
from ckpt2pt_operator.rules.views import Claim, Pod, claim_view, condition, items, job_view, pod_view, warning_view
from ckpt2pt_operator.rules.views import time as moment
from ckpt2pt_operator.rules.volumes import claims_of
from ckpt2pt_operator.store import Store

_VOLATILE = frozenset({"progress", "bytesDone", "bytesTotal"})
_VOLATILE_OF_STAGE = frozenset({"bytes", "bytesTotal", "throughput"})
_PROGRESS_SECONDS = 10.0
_RUNNING_FOR_ONE_SECOND = 10
_JOB_NAME = "batch.kubernetes.io/job-name"
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _CONFLICT = 401, 403, 404, 409
_NEVER = frozenset({400, 413, 422})
"""What no API server takes, however often it is asked: it cannot be read, it is too large, it is wrong."""
_REFUSED_SECONDS = {True: 5.0, False: 30.0}
"""Until a Job is asked for again, by whether the API server is only busy."""

log = logging.getLogger(__name__)


class Workloads(Protocol):
    """Who knows how the workload stands that a conversion waits for."""

    async def look(self, conversion: Json, after: Json) -> Training:
        """How it stands."""
        raise NotImplementedError


class Reconciler:
    """One for the process; ``reconcile`` may run for several keys at a time."""

    def __init__(
        self,
        api: Api,
        store: Store,
        metrics: Metrics,
        operator_defaults: OperatorDefaults,
        *,
        check_volumes: bool,
        live_progress: bool = True,
        trainings: Workloads | None = None,
    ) -> None:
        self._api, self._store, self._metrics, self._house = api, store, metrics, operator_defaults
        self._check_volumes = check_volumes
        self._trainings = trainings
        self._progress, self._recorder = Progress(store.put_live) if live_progress else None, Recorder(api)
        self._written_at: dict[Key, float] = {}

    async def close(self) -> None:
        """Close what is open."""
        if self._progress:
            await self._progress.close()

    async def reconcile(self, key: Key) -> float | None:
        """Do what is due for one conversion; returns in how many seconds it wants to be looked at again."""
        raw = await self._document(key)
        if raw is None or "deletionTimestamp" in child(raw, "metadata"):
            self._written_at.pop(key, None)
            return None  # its Jobs and pods are collected by the API server
        seen = await self._look(raw)
        if await self._leave(seen, key[0]):
            return None
        decided = plan(seen, self._house)
        written = await self._write(raw, decided.status)
        if written is None:
            return None
        for action in decided.actions:
            to_error = await self._act(written, action)
            if to_error is not None:
                decided = plan(replace(seen, conversion=written, to_error=to_error), self._house)
                await self._write(written, decided.status)
                break
        return self._again(decided)

    async def _document(self, key: Key) -> Json | None:
        """The conversion, from the API server where it is too large to be held in memory; None where it is gone."""
        kept = self._store.conversions.get(key)
        if kept is None or kept.packed is not None:
            return None if kept is None else kept.document()
        try:
            raw = slim(await self._api.get(CONVERSIONS, *key))
        except ApiError as error:
            if error.code != _NOT_FOUND:
                raise
            return None  # the watch is about to tell
        self._store.put_conversion(raw)
        return raw

    async def _leave(self, seen: Seen, namespace: str) -> bool:
        """Delete the Jobs of a namespace that is being deleted; whether it is.

        Kubernetes deletes pods first, and waits.  The Job controller holds a failed pod of an index that may be tried
        again until there is another, which cannot be made there: the namespace would never go.
        """
        jobs = [job for job in seen.jobs if not job.ending and not job.deleted]
        if not jobs or not any(pod.over and pod.deleted and not pod.gone for pod in seen.pods):
            return False
        if not await self._api.is_ending(namespace):
            return False
        for job in jobs:
            await self._act(seen.conversion, DeleteJob(job=job))
        return True

    def _again(self, decided: Plan) -> float | None:
        if decided.again is None or decided.again < _PROGRESS_SECONDS:
            return decided.again
        return max(decided.again, self._progress_interval())

    def _progress_interval(self) -> float:
        """Progress is reported less often when there is much of it, so that writes stay bounded."""
        running = self._store.phases["Running"] + self._store.phases["Following"]
        return max(_PROGRESS_SECONDS, running / _RUNNING_FOR_ONE_SECOND)

    # ------------------------------------------------------------------------------------------------------------ look

    async def _look(self, raw: Json) -> Seen:
        meta, key = child(raw, "metadata"), key_of(raw)
        uid = text(meta, "uid")
        jobs, pods = self._store.jobs(key, uid), self._store.pods(key, uid)
        seen = Seen(conversion=raw, now=self._api.now(), jobs=jobs, pods=pods)
        if child(raw, "status").get("phase") in TERMINAL:
            return seen
        await self._find_job(raw, seen)
        await self._find_pods(key, uid)
        try:
            conversion = conversion_of(raw, self._house)
        except UsageError:
            return seen
        claims, live, warnings = await asyncio.gather(
            self._claims(text(meta, "namespace"), list(claims_of(conversion))),
            self._live(seen.pods),
            self._warnings(text(meta, "namespace"), wants_warnings(seen)),
        )
        after = awaited(raw)
        training = await self._trainings.look(raw, after) if self._trainings is not None and after else None
        return replace(
            seen, claims=claims, live=live, warnings=warnings, training=training, now=self._api.now(),
            jobs=self._store.jobs(key, uid), pods=self._store.pods(key, uid),
        )  # fmt: skip

    async def _find_job(self, raw: Json, seen: Seen) -> None:
        """A Job that the status knows and the store does not: a watch may lag behind, so it is looked for."""
        status = child(raw, "status")
        uid, name = text(status, "jobUID"), text(status, "job")
        if not uid or any(job.uid == uid for job in seen.jobs):
            return
        try:
            self._store.put_job(job_view(await self._api.get(JOBS, key_of(raw)[0], name)))
        except ApiError as error:
            if error.code != _NOT_FOUND:
                raise

    async def _find_pods(self, key: Key, uid: str) -> None:
        """The pods of a Job that has ended, where the watch is behind or silent: they have the last word of the workers."""
        for job in self._store.jobs(key, uid):
            pods = [pod for pod in self._store.pods(key, uid) if pod.job_uid == job.uid]
            if job.ending and behind(job, pods):
                there: set[str] = set()
                query = {"labelSelector": f"{_JOB_NAME}={job.name}"}
                async for pod in pages(self._api, PODS, job.namespace, pod_view, **query):
                    there.add(pod.uid)
                    self._store.put_pod(pod)
                for pod in pods:
                    if pod.uid not in there and not pod.gone:
                        self._store.drop_pod(pod)

    async def _claims(self, namespace: str, names: list[str]) -> dict[str, Claim | None] | None:
        if not self._check_volumes:
            return None
        found: dict[str, Claim | None] = {}
        for name in names:
            try:
                found[name] = claim_view(await self._api.get(CLAIMS, namespace, name))
            except ApiError as error:
                if error.code == _FORBIDDEN:
                    return None
                if error.code != _NOT_FOUND:
                    raise
                found[name] = None
        return found

    async def _live(self, pods: Sequence[Pod]) -> dict[str, Report]:
        if self._progress:
            await self._progress.ask(pods)
        return {pod.uid: self._store.live[pod.uid] for pod in pods if pod.uid in self._store.live}

    async def _warnings(self, namespace: str, uids: tuple[str, ...]) -> dict[str, str]:
        """The newest warning event about each."""
        found: dict[str, str] = {}
        for uid in uids:
            query = {"fieldSelector": f"involvedObject.uid={uid},type=Warning", "limit": "50"}
            try:
                events = (await self._api.list(EVENTS, namespace, warning_view, **query)).items
            except ApiError as error:
                if error.code != _FORBIDDEN:
                    raise
                return {}
            if newest := max(filter(None, events), default=None):
                found[uid] = newest[1]
        return found

    # ----------------------------------------------------------------------------------------------------------- write

    async def _write(self, raw: Json, status: Json) -> Json | None:
        """Write the status if it says something new; returns the object as it is then, None where it is gone."""
        before = child(raw, "status")
        key = key_of(raw)
        if before == status or (steady(before) == steady(status) and not self._progress_is_due(key)):
            self._metrics.status_writes_suppressed.inc()
            return raw
        namespace, name = key
        self._written_at[key] = time.monotonic()  # whatever comes of it: an answer may be lost
        meta = child(raw, "metadata")
        # The API server takes the rest from what it has, and refuses where that is another version.
        named = {field: meta[field] for field in ("namespace", "name", "uid", "resourceVersion")}
        body: Json = {"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": named, "status": status}
        try:
            written = slim(await self._api.put_status(CONVERSIONS, namespace, name, body))
        except ApiError as error:
            if error.code == _NOT_FOUND:
                self._store.drop_conversion(raw)
                return None
            raise
        self._metrics.status_writes.inc()
        self._store.put_conversion(written)
        self._count(before, status)
        for note in notes(before, status):
            await self._recorder.write(raw, note)
        return written

    def _progress_is_due(self, key: Key) -> bool:
        return time.monotonic() - self._written_at.get(key, float("-inf")) >= self._progress_interval()

    def _count(self, before: Json, after: Json) -> None:
        if after.get("phase") in TERMINAL and before.get("phase") not in TERMINAL:
            ready = condition(items(after, "conditions"), "Ready")
            self._metrics.finished.labels(str(after["phase"]), text(ready, "reason", 64)).inc()
            started, ended = moment(after, "startTime"), moment(after, "completionTime")
            if started and ended:
                self._metrics.conversion_seconds.observe((ended - started).total_seconds())
        if follows(after):
            # Its one worker runs for weeks, and is done with a checkpoint when it names the next iteration.
            if number(after, "iteration", -1) > number(before, "iteration", -1):
                self._metrics.converted_bytes.inc(number(after, "bytesTotal"))
            return
        known = {number(item, "stage"): item for item in items(before, "stageStatuses")}
        for item in items(after, "stageStatuses"):
            old = known.get(number(item, "stage"), {})
            if item.get("state") == old.get("state"):
                continue
            if item.get("state") == "Succeeded":
                self._metrics.converted_bytes.inc(number(item, "bytes"))

    # ------------------------------------------------------------------------------------------------------------- act

    async def _act(self, raw: Json, action: Action) -> Refusal | None:
        """Do it; returns why the API server will not have the Job, if it will not."""
        if isinstance(action, CreateJob):
            return await self._create(action.manifest)
        if isinstance(action, DeleteConversion):
            await self._delete(raw)
            return None
        job = action.job
        try:
            if isinstance(action, PatchJob):
                body: Json = {"metadata": {"uid": job.uid, "resourceVersion": job.version}, "spec": action.spec}
                self._store.put_job(job_view(await self._api.patch(JOBS, job.namespace, job.name, body)))
            else:
                await self._api.delete(JOBS, job.namespace, job.name, uid=job.uid)
        except ApiError as error:
            if error.code not in {_NOT_FOUND, _CONFLICT}:
                if not error.passing:
                    what = f"Job {job.name} cannot be changed: {error.message}"
                    await self._recorder.write(raw, Note(kind="Warning", reason="JobNotChanged", message=what))
                raise
            log.info("a Job has changed meanwhile", extra={"job": f"{job.namespace}/{job.name}", "error": str(error)})
        return None

    async def _delete(self, raw: Json) -> None:
        """Delete a finished conversion, unless somebody has changed it since."""
        meta, (namespace, name) = child(raw, "metadata"), key_of(raw)
        uid, version = text(meta, "uid"), text(meta, "resourceVersion")
        try:
            await self._api.delete(CONVERSIONS, namespace, name, uid=uid, version=version)
        except ApiError as error:
            if error.code not in {_NOT_FOUND, _CONFLICT}:
                raise
            return
        log.info("deleted: its time to live is over", extra={"conversion": f"{namespace}/{name}"})

    async def _create(self, manifest: Json) -> Refusal | None:
        namespace, name = key_of(manifest)
        try:
            created = await self._api.create_object(JOBS, namespace, manifest)
        except ApiError as error:
            if error.code == _CONFLICT:
                return await self._adopt(manifest)
            reason = refusal_of(error)
            if not reason:
                raise
            return Refusal(
                reason=reason, message=error.message, pause=max(error.pause, _REFUSED_SECONDS[error.passing])
            )
        self._store.put_job(job_view(created))
        log.info("Job created", extra={"job": f"{namespace}/{name}"})
        return None

    async def _adopt(self, manifest: Json) -> Refusal | None:
        """The name is taken: by the same Job, created before a restart, or by somebody else's."""
        namespace, name = key_of(manifest)
        found = job_view(await self._api.get(JOBS, namespace, name))
        [owner] = cast("list[Json]", child(manifest, "metadata")["ownerReferences"])
        if found.owner == owner["uid"]:
            self._store.put_job(found)
            return None
        if found.ours and found.owner:
            # It belonged to an earlier conversion of this name, and the API server is about to collect it.
            raise ApiError(_CONFLICT, "AlreadyExists", f"Job {name} of an earlier conversion is still there", pause=2.0)
        # One of ours without an owner was left behind by a deletion with --cascade=orphan.
        hint = "delete it, or choose another name for the conversion"
        return Refusal(reason="NameConflict", message=f"there is a Job {name} that is not of this conversion; {hint}")


def refusal_of(error: ApiError) -> str:
    """Why the API server, or whoever it asks, will not have a Job; empty where it has not said that.

    A webhook chooses its code freely, and gets 400 without one; a ValidatingAdmissionPolicy says 422, as a wrong Job would.
    """
    if is_quota(error.message):
        return "QuotaExceeded"
    denied = "denied the request" in error.message or "denied request" in error.message
    if denied or "failed calling webhook" in error.message or error.code == _FORBIDDEN:
        return "JobRefused"
    if error.code in {0, _UNAUTHORIZED, _NOT_FOUND}:
        return ""
    if error.passing:
        return "JobNotCreated"
    return "InvalidSpec" if error.code in _NEVER else "JobRefused"


def steady(status: Json) -> Json:
    """A status without what changes all the time."""
    kept = {name: value for name, value in status.items() if name not in _VOLATILE}
    stages = [
        {name: value for name, value in item.items() if name not in _VOLATILE_OF_STAGE}
        for item in items(status, "stageStatuses")
    ]
    return kept | ({"stageStatuses": stages} if stages else {})
