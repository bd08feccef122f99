"""What to do next for one CheckpointConversion, from what was seen and the time.  Pure::

    (object, Jobs, pods, claims, now) --plan--> status to write, actions to take after that, when to look again

A status is written before anything is done, and every step can be repeated, so an operator that dies anywhere goes on
where it was.  Results of stages are taken from the Job while it is there and stay in the status when it is gone; a
phase that is terminal stays so, unless the annotation ``ckpt2pt.dev/retry`` gets a new value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from ckpt2pt.conversion.job import build_job, grown_memory, job_name, parallelism
from ckpt2pt.conversion.spec import Conversion, Json, parse
from ckpt2pt.conversion.status import TERMINAL, WAITING, Ending, StageRecord
from ckpt2pt.errors import UsageError
from ckpt2pt_operator.rules import awaits, volumes
from ckpt2pt_operator.rules.changes import BY_USER, changes, suspension, unheeded, volumes_ready
from ckpt2pt_operator.rules.conditions import (
    NOT_LOOKED,
    Standing,
    Verdict,
    refused_document,
    stamp,
    status_document,
)
from ckpt2pt_operator.rules.defaults import filled, life_left, of_pods
from ckpt2pt_operator.rules.endings import RETRY_ANNOTATION, ending, planned, reason_of
from ckpt2pt_operator.rules.kept import refused
from ckpt2pt_operator.rules.seen import Action, CreateJob, DeleteConversion, DeleteJob, House, PatchJob, Plan, Seen
from ckpt2pt_operator.rules.stages import (
    OUT_OF_MEMORY,
    Obstacle,
    behind,
    observed,
    pod_obstacle,
    recorded,
    refused_pods,
    setback,
    stuck_since,
)
from ckpt2pt_operator.rules.views import Job, Pod, child, condition, items, number, report_of, text, time

MAX_RECREATIONS = 3
POLL_SECONDS = 10.0
"""How often a conversion with running workers is looked at for its progress."""
_WAIT_SECONDS = 30.0
_SETTLE = timedelta(seconds=5)
"""How long a finished Job may be ahead of its pods in what the API server sends."""


def conversion_of(document: Json, house: House) -> Conversion:
    """The document with the operator's defaults; UsageError where it is wrong."""
    if error := refused(document):
        raise error
    conversion = parse(filled(document, house.pod))
    own = {name: value for name, value in conversion.workers.pod.items() if value not in ({}, [], None)}
    if "queueName" not in own:
        own.pop("queueKind", None)  # an API server fills it in, and the queue of the house has a kind of its own
    pod = {**conversion.workers.pod, **of_pods(house.pod), **own}
    together = pod.pop("coSchedule", False) is True
    if "coSchedule" in child(document, "spec", "workers"):
        together = conversion.workers.co_schedule
    return replace(conversion, workers=replace(conversion.workers, pod=pod, co_schedule=together))


def plan(seen: Seen, house: House) -> Plan:
    """Decide."""
    decided = _decide(seen, house)
    over = decided.status.get("phase") in TERMINAL and decided.again is None and house.deletes
    left = life_left(seen.conversion, decided.status, house.pod, seen.now) if over else None
    if left is None:
        return decided
    if left > 0:
        return replace(decided, again=left)
    return replace(decided, actions=(DeleteConversion(),))


def _decide(seen: Seen, house: House) -> Plan:
    before = child(seen.conversion, "status")
    try:
        conversion = conversion_of(seen.conversion, house)
    except UsageError as error:
        return _refused(seen, before, str(error).replace("\n", " "))
    case = _Case(seen, house, conversion, before)
    if before.get("phase") in TERMINAL:
        return case.again() if case.wants_retry() else case.afterwards()
    if conversion.cancel:
        return case.cancelled()
    job = case.job
    if job is None:
        return case.without_job()
    return case.with_job(job)


def _refused(seen: Seen, before: Json, message: str) -> Plan:
    generation = number(child(seen.conversion, "metadata"), "generation")
    # An operator of another version may have begun it.
    stop = tuple(DeleteJob(job=job) for job in seen.jobs if not job.ending and not job.deleted)
    if before.get("phase") in TERMINAL:
        return Plan(status=before, actions=stop)
    return Plan(status=refused_document(message, before=before, generation=generation, now=seen.now), actions=stop)


def _told_of_volumes(before: Json) -> Verdict | None:
    """The condition as it was written: looking at claims is not part of every decision."""
    told = condition(items(before, "conditions"), "VolumesReady")
    for status in ("True", "False", "Unknown"):
        if told.get("status") == status:
            return status, text(told, "reason"), text(told, "message")
    return None


class _Case:
    """One conversion while it is decided on."""

    def __init__(self, seen: Seen, house: House, conversion: Conversion, before: Json) -> None:
        self.seen, self.house, self.conversion, self.before = seen, house, conversion, before
        metadata = child(seen.conversion, "metadata")
        self.generation = number(metadata, "generation")
        self.token = text(child(metadata, "annotations"), RETRY_ANNOTATION, 253)
        total = 1 if conversion.one_worker else conversion.topology.pipeline
        self.records = recorded(before, total)
        jobs = sorted((job for job in seen.jobs if job.owner == conversion.uid), key=lambda job: job.attempt)
        attempt = number(before, "attempt", 0) or max((job.attempt for job in jobs), default=1)
        self.job = next((job for job in jobs if job.attempt == attempt), None)
        if "stageStatuses" not in before:
            # The status was lost: what is left of earlier attempts tells what they did.
            for job in jobs:
                self.records = (
                    observed(self.records, job, self.workers(job), {}) if job.attempt < attempt else self.records
                )
        token = text(before, "retryToken", 253)
        if before.get("phase") not in TERMINAL:
            token = self.token or token  # whoever asks before there is a failure has to ask again
        self.alive = [pod for pod in seen.pods if not pod.over]
        self.standing = Standing(
            records=tuple(self.records.values()),
            attempt=attempt,
            job=job_name(conversion, attempt),
            job_uid=text(before, "jobUID"),
            recreations=number(before, "jobRecreations"),
            retry_token=token,
            memory_percent=number(before, "memoryPercent") or 100,
            started=text(before, "startTime") or None,
            iteration=number(before, "iteration") if "iteration" in before else None,
            training_uid=text(before, "trainingUID"),
            follow_end=text(before, "followEnd"),
            volumes=_told_of_volumes(before) or NOT_LOOKED,
        )

    def workers(self, job: Job) -> list[Pod]:
        """Its pods; a Job of the same name that was deleted may have left some."""
        return [pod for pod in self.seen.pods if pod.job_uid == job.uid]

    # ------------------------------------------------------------------------------------------------------- endings

    def plan(self, standing: Standing, *actions: Action, again: float | None = None) -> Plan:
        status = status_document(
            self.conversion, standing, before=self.before, generation=self.generation, now=self.seen.now
        )
        return Plan(status=status, actions=actions, again=again)

    def wait(self, standing: Standing, waits: Obstacle, *actions: Action) -> Plan:
        """Pods have to end first; a lost node may keep them, and only somebody who is told can do anything about it."""
        return self.plan(replace(standing, waits=waits, degraded=self.obstacle()), *actions, again=_WAIT_SECONDS)

    def obstacle(self) -> Obstacle | None:
        return pod_obstacle(self.seen.pods, self.seen.warnings, self.seen.now)

    def end(self, standing: Standing, ended: Ending | None, *actions: Action) -> Plan:
        records = tuple(
            replace(record, state="Pending") if record.state == "Running" else record for record in standing.records
        )
        return self.plan(replace(standing, ended=ended, finished=stamp(self.seen.now), records=records), *actions)

    def wants_retry(self) -> bool:
        return self.before.get("phase") == "Failed" and bool(self.token) and self.token != self.standing.retry_token

    def again(self) -> Plan:
        """A new attempt, for the stages that are not done; it begins when nothing of the failed one works any more."""
        attempt = self.standing.attempt + (1 if self.standing.job_uid or self.job else 0)
        records = tuple(
            record if record.state == "Succeeded" else StageRecord(stage=record.stage)
            for record in self.records.values()
        )
        return self.plan(
            replace(
                self.standing,
                records=records,
                attempt=attempt,
                job=job_name(self.conversion, attempt),
                job_uid="",
                recreations=0,
                retry_token=self.token,
                training_uid=self.standing.training_uid if self.standing.started else "",
                volumes=NOT_LOOKED,
            ),
            again=0.0,
        )

    def afterwards(self) -> Plan:
        """Nothing more happens, but what is left of the Jobs goes: at once if it still works, else in its time."""
        ttl = self.conversion.ttl_seconds_after_finished
        actions: list[Action] = [DeleteJob(job=job) for job in self.seen.jobs if not job.ending and not job.deleted]
        actions += [
            PatchJob(job=job, spec={"ttlSecondsAfterFinished": ttl})
            for job in self.seen.jobs
            if job.ending and not job.deleted and ttl is not None and job.ttl != ttl
        ]
        return Plan(status=self.before | {"observedGeneration": self.generation}, actions=tuple(actions))

    def cancelled(self) -> Plan:
        left = [job for job in self.seen.jobs if not job.ending]
        if self.job is not None:
            self.records = observed(self.records, self.job, self.workers(self.job), self.seen.live)
            self.standing = replace(self.standing, records=tuple(self.records.values()))
        if left or self.alive:
            waits = Obstacle(reason="Cancelling", message=f"{len(self.alive)} workers are told to stop")
            deletions = [DeleteJob(job=job) for job in left if not job.deleted]
            return self.wait(self.standing, waits, *deletions)
        done = sum(record.state == "Succeeded" for record in self.records.values())
        message = f"spec.cancel was set; {done} of {len(self.records)} stages were done, and their files stay"
        return self.end(self.standing, Ending(reason="Cancelled", message=message))

    # --------------------------------------------------------------------------------------------------- before a Job

    def todo(self) -> list[int]:
        return [stage for stage, record in self.records.items() if record.state not in {"Succeeded", "Failed"}]

    def without_job(self) -> Plan:
        if self.conversion.suspend:
            self.standing = replace(self.standing, suspended=BY_USER)
        standing = self.standing
        if standing.started is None and self.conversion.start_after is not None:
            held = self.training()
            if held is not None:
                return held
        self.follow()
        standing = self.standing
        earlier = [job for job in self.seen.jobs if job.attempt < standing.attempt and not job.ending]
        if self.alive or earlier:
            # One writer for each stage.
            waits = Obstacle(reason="WaitingForPods", message=f"{len(self.alive)} pods of an earlier Job are ending")
            return self.wait(standing, waits, *(DeleteJob(job=job) for job in earlier if not job.deleted))
        todo = self.todo()
        if not todo:
            return self.end(standing, None)  # the Job was deleted when it had nothing left to do
        workers = parallelism(self.conversion, 1 if self.conversion.one_worker else len(todo))
        verdict = volumes.verdict(self.conversion, self.seen.claims, workers)
        standing = replace(standing, volumes=verdict)
        if verdict[0] == "False":
            return self.held(standing, Obstacle(reason=verdict[1], message=verdict[2]))
        if standing.job_uid:
            if standing.recreations >= MAX_RECREATIONS:
                message = f"the Job was deleted {MAX_RECREATIONS + 1} times; set spec.cancel to stop a conversion"
                return self.end(standing, Ending(reason="JobDeleted", message=message))
            standing = replace(standing, recreations=standing.recreations + 1, job_uid="")
        return self.create(standing, todo)

    def create(self, standing: Standing, todo: list[int]) -> Plan:
        """Ask for the Job, or say why the API server would not have it just now."""
        refusal = self.seen.refusal
        manifest = build_job(
            self.conversion,
            image=self.house.image,
            attempt=standing.attempt,
            stages=None if self.conversion.one_worker else todo,
            memory_percent=standing.memory_percent,
            ended=standing.follow_end,
        )
        if refusal is not None:
            if refusal.reason in {"NameConflict", "InvalidSpec"}:
                return self.end(standing, Ending(reason=refusal.reason, message=refusal.message))
            waits = Obstacle(reason=refusal.reason, message=refusal.message)
            return self.plan(replace(standing, waits=waits), again=_WAIT_SECONDS)
        started = standing.started or stamp(self.seen.now)
        standing = replace(standing, started=started, waits=self.refused_before())
        return self.plan(standing, CreateJob(manifest=manifest), again=_WAIT_SECONDS)

    def refused_before(self) -> Obstacle | None:
        """Why there was no Job when it was asked for last: that is how it stands until there is one."""
        ready = condition(items(self.before, "conditions"), "Ready")
        refused = ready.get("reason") in {"QuotaExceeded", "JobRefused"}
        return Obstacle(reason=text(ready, "reason"), message=text(ready, "message")) if refused else None

    def training(self) -> Plan | None:
        """Wait for the training; None once it has succeeded."""
        training = self.seen.training
        standing = awaits.recognised(self.standing, training)
        found = awaits.start(self.conversion, standing, training)
        if found is None:
            # From here on the training may be deleted.
            self.standing = replace(standing, started=stamp(self.seen.now))
            return None
        if isinstance(found, Ending):
            return self.end(standing, found)
        # The training's own events bring it back; of a kind that nobody serves there are none.
        again = _WAIT_SECONDS if training and training.state == "Unknown" else None
        return self.plan(replace(standing, waits=found), again=again)

    def follow(self) -> None:
        """Notice how the training that is followed stands."""
        standing = awaits.recognised(self.standing, self.seen.training)
        self.standing = replace(standing, follow_end=awaits.follow_end(self.conversion, standing, self.seen.training))

    def held(self, standing: Standing, obstacle: Obstacle) -> Plan:
        """Wait for a volume, but not for ever where nobody has suspended it."""
        told = [condition(items(self.before, "conditions"), kind) for kind in ("VolumesReady", "Suspended")]
        times = [time(item, "lastTransitionTime") for item in told if item.get("status") == "False"]
        since = [moment for moment in times if moment]
        left = self.left(max(since) if len(since) == len(told) and not standing.suspended else self.seen.now)
        if left <= 0:
            return self.end(standing, self.too_late(obstacle))
        return self.plan(replace(standing, waits=obstacle), again=min(left, 15.0))

    def left(self, since: datetime) -> float:
        """Seconds until the pending deadline."""
        waited = (self.seen.now - since).total_seconds()
        return self.conversion.pending_deadline_seconds - waited

    def too_late(self, obstacle: Obstacle | None) -> Ending:
        seconds = self.conversion.pending_deadline_seconds
        why = f"{obstacle.reason}: {obstacle.message}" if obstacle else "no reason is known"
        return Ending(reason="PendingDeadline", message=f"no worker could start for {seconds} s; {why}")

    # ----------------------------------------------------------------------------------------------------- with a Job

    def with_job(self, job: Job) -> Plan:
        pods = self.workers(job)
        records = observed(self.records, job, pods, self.seen.live)
        self.standing = standing = replace(
            self.standing,
            records=tuple(records.values()),
            job_uid=job.uid,
            started=self.standing.started or stamp(job.created or self.seen.now),
            iteration=self.iteration(pods),
            volumes=volumes_ready(self.conversion, job, self.seen.claims),
        )
        if job.ending:
            return self.finished(job, pods)
        if job.deleted:
            waits = Obstacle(reason="JobDeleted", message="the Job is being deleted; it is made anew when it is gone")
            return self.wait(standing, waits)
        self.follow()
        if self.standing.follow_end != standing.follow_end:
            # Its follower goes; one more Job takes the last look.
            return self.another(standing.memory_percent, {0})
        standing = replace(self.standing, unheeded=unheeded(self.conversion, job))
        spec = changes(self.conversion, job, self.seen.claims)
        actions = [PatchJob(job=job, spec=spec)] if spec else []
        if job.suspended:
            begun = any(record.attempts or record.state != "Pending" for record in standing.records)
            why = suspension(self.conversion, job, begun=begun)
            standing = replace(standing, suspended=why, degraded=self.obstacle())
            return self.plan(standing, *actions, again=_WAIT_SECONDS if self.alive else None)
        refused = refused_pods(job, pods, self.seen.warnings)
        obstacle = refused or self.obstacle()
        since = stuck_since(job, pods, refused)
        if since is not None and self.left(since) <= 0:
            return self.end(replace(standing, degraded=obstacle), self.too_late(obstacle), DeleteJob(job=job))
        waiting = next((r for r in standing.records if r.state == "Running" and r.reason == WAITING), None)
        if waiting is not None:
            standing = replace(standing, waits=Obstacle(reason=WAITING, message=waiting.message))
        degraded = obstacle or setback(self.conversion, standing.records)
        degraded = degraded or awaits.unfollowed(self.conversion, standing, self.seen.training)
        if degraded is None and not job.per_index:
            degraded = Obstacle(
                reason="PerIndexRetryUnsupported",
                message="this Kubernetes has no backoffLimitPerIndex (1.29 has): stages share their retries",
            )
        missing = 'persistentvolumeclaim "' in (obstacle.message if obstacle else "")
        if obstacle and missing and "not found" in obstacle.message:
            standing = replace(standing, volumes=("False", "PVCNotFound", obstacle.message))
        wait = POLL_SECONDS if any(pod.running for pod in pods) else 15.0
        if since is not None:
            wait = max(min(wait, self.left(since)), 0.5)
        return self.plan(replace(standing, degraded=degraded), *actions, again=wait)

    def iteration(self, pods: Sequence[Pod]) -> int | None:
        # What a worker said while it waited for the checkpoint had no iteration yet.
        reports = [report for pod in pods for report in (report_of(pod.report), self.seen.live.get(pod.uid)) if report]
        return next((r.iteration for r in reports if r.iteration is not None), self.standing.iteration)

    def finished(self, job: Job, pods: Sequence[Pod]) -> Plan:
        """The Job is over: end, or give the stages that ran out of memory more of it."""
        standing = self.standing
        ahead = job.completed_at is not None and self.seen.now - job.completed_at < _SETTLE
        if ahead and behind(job, pods):
            return self.plan(standing, again=1.0)
        failed = [record for record in standing.records if record.state == "Failed"]
        starved = [record for record in failed if record.reason == OUT_OF_MEMORY]
        if starved and reason_of(job) == "StageFailed" and job.reason != "PodFailurePolicy":
            percent = -(-standing.memory_percent * (100 + self.conversion.retries.memory_growth_percent) // 100)
            now, then = (grown_memory(self.conversion, p) for p in (standing.memory_percent, percent))
            if now is not None and then is not None and then > now:
                return self.another(percent, {record.stage for record in starved})
        if job.ending == "Complete" and not failed:
            # Of a status that was lost some stages may be known to nobody; one that is done ends at once.
            return self.another(standing.memory_percent, set()) if self.left_out() else self.done(pods)
        return self.end(standing, ending(self.conversion, job, pods, failed))

    def done(self, pods: Sequence[Pod]) -> Plan:
        return self.end(replace(self.standing, planned=planned(pods) if self.conversion.dry_run else ""), None)

    def left_out(self) -> bool:
        return any(record.state != "Succeeded" for record in self.standing.records)

    def another(self, percent: int, stages: set[int]) -> Plan:
        """A new attempt for these stages and those that nobody has done, with that much memory."""
        attempt = self.standing.attempt + 1
        records = tuple(
            replace(record, state="Pending", attempts=0) if record.stage in stages else record
            for record in self.standing.records
        )
        return self.plan(
            replace(
                self.standing, records=records, attempt=attempt, job=job_name(self.conversion, attempt), job_uid="",
                memory_percent=percent,
            ),
            again=0.0,
        )  # fmt: skip
