"""What to do next for one CheckpointConversion, from what was seen and the time.  Pure::

    (object, Jobs, pods, claims, now) --plan--> status to write, actions to take after that, when to look again

A status is written before anything is done, and every step can be repeated, so an operator that dies anywhere goes on
where it was.  Results of stages are taken from the reports of workers, which may outlive their Job, and stay in the
status when they are gone.  Whatever ends a conversion, the last words of its workers are read first.  A phase that is
terminal stays so, unless the annotation ``ckpt2pt.dev/retry`` gets a new value.
"""

from __future__ import annotations

from dataclasses import replace

from msgspec import structs

from ckpt2pt.conversion.job import build_job, grown_memory, job_name, parallelism
from ckpt2pt.conversion.report import NO_REPORT
from ckpt2pt.conversion.schema import Json
from ckpt2pt.conversion.spec import Conversion, parse
from ckpt2pt.conversion.status import TERMINAL, WAITING, Ending, StageRecord, disagreement
from ckpt2pt.errors import UsageError
from ckpt2pt_operator.rules import awaits, permissions, volumes
from ckpt2pt_operator.rules.case import WAIT_SECONDS, Case
from ckpt2pt_operator.rules.changes import BY_USER, changes, suspension, unheeded, volumes_ready
from ckpt2pt_operator.rules.conditions import NOT_LOOKED, Standing, refused_document, stamp, still
from ckpt2pt_operator.rules.defaults import filled, life_left, of_pods
from ckpt2pt_operator.rules.endings import ending, reason_of
from ckpt2pt_operator.rules.kept import refused
from ckpt2pt_operator.rules.seen import (
    REFUSALS,
    Action,
    CreateJob,
    DeleteConversion,
    DeleteJob,
    House,
    PatchJob,
    Plan,
    Seen,
)
from ckpt2pt_operator.rules.stages import OUT_OF_MEMORY, Obstacle, refused_pods, setback, stuck_since
from ckpt2pt_operator.rules.views import Job, child, condition, items, number, text

MAX_RECREATIONS = 3
POLL_SECONDS = 10.0
"""How often a conversion with running workers is looked at for its progress."""
_VOLUME_SECONDS = 15.0


def conversion_of(document: Json, house: House) -> Conversion:
    """The document with the operator's defaults; UsageError where it is wrong."""
    if error := refused(document):
        raise error
    conversion = parse(filled(document, house.pod))
    own = {name: value for name, value in conversion.pod.items() if value not in ({}, [], None)}
    if "queueName" not in own:
        own.pop("queueKind", None)  # an API server fills it in, and the queue of the house has a kind of its own
    pod = {**conversion.pod, **of_pods(house.pod), **own}
    together = pod.pop("coSchedule", False) is True
    if "coSchedule" in child(document, "spec", "workers"):
        together = conversion.spec.workers.co_schedule
    workers = structs.replace(conversion.spec.workers, co_schedule=together)
    return replace(conversion, pod=pod, spec=structs.replace(conversion.spec, workers=workers))


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
    if conversion.spec.cancel:
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
        return Plan(status=still(before, generation), actions=stop)
    return Plan(status=refused_document(message, before=before, generation=generation, now=seen.now), actions=stop)


class _Case(Case):
    """What to do next."""

    # --------------------------------------------------------------------------------------------- ended, or to end

    def wants_retry(self) -> bool:
        return self.before.get("phase") == "Failed" and bool(self.token) and self.token != self.standing.retry_token

    def again(self) -> Plan:
        """A new attempt, for the stages that are not done; it begins when nothing of the failed one works any more."""
        attempt = self.standing.attempt + (1 if self.standing.job_uid or self.job else 0)
        kept = disagreement(tuple(self.records.values())) is None
        records = tuple(
            record if record.state == "Succeeded" and kept else StageRecord(stage=record.stage)
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
        ttl = self.conversion.spec.ttl_seconds_after_finished
        actions: list[Action] = [DeleteJob(job=job) for job in self.seen.jobs if not job.ending and not job.deleted]
        actions += [
            PatchJob(job=job, spec={"ttlSecondsAfterFinished": ttl})
            for job in self.seen.jobs
            if job.ending and not job.deleted and ttl is not None and job.ttl != ttl
        ]
        return Plan(status=still(self.before, self.generation), actions=tuple(actions))

    def cancelled(self) -> Plan:
        """Stop; what the workers did meanwhile counts, and all of it done is a success."""
        left = [job for job in self.seen.jobs if not job.ending]
        self.listen()
        if left or self.alive:
            waits = Obstacle(reason="Cancelling", message=f"{len(self.alive)} workers are told to stop")
            deletions = [DeleteJob(job=job) for job in left if not job.deleted]
            return self.wait(self.standing, waits, *deletions)
        if self.is_behind():
            return self.plan(self.standing, again=1.0)
        if not self.left_out():
            return self.done()
        done = sum(record.state == "Succeeded" for record in self.standing.records)
        message = f"spec.cancel was set; {done} of {len(self.records)} stages were done, and their files stay"
        unseen = ", ".join(str(record.stage) for record in self.standing.records if record.state == "Running")
        if unseen:
            message += (
                f"; nobody saw how stage {unseen} ended, so it may be done too: see the report on the target volume"
            )
        return self.end(self.standing, Ending(reason="Cancelled", message=message))

    # --------------------------------------------------------------------------------------------------- before a Job

    def without_job(self) -> Plan:
        self.listen()
        # A Job that is there was allowed when it was made, and goes on.  The operator's own defaults are the owner's words.
        refused = permissions.refusal(parse(self.seen.conversion), self.house.allowed)
        if refused and self.todo() and not self.alive:
            standing = replace(self.standing, accepted=("False", "NotAllowed", refused))
            return self.end(standing, Ending(reason="NotAllowed", message=refused))
        if self.conversion.spec.suspend:
            self.standing = replace(self.standing, suspended=BY_USER)
        standing = self.standing
        if standing.started is None and self.conversion.spec.start_after is not None:
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
            return self.done()  # the Job was deleted when it had nothing left to do
        workers = parallelism(self.conversion, 1 if self.conversion.one_worker else len(todo))
        verdict = volumes.verdict(self.conversion, self.seen.claims, workers)
        standing = replace(standing, volumes=verdict)
        if verdict[0] == "False":
            return self.held(standing, Obstacle(reason=verdict[1], message=verdict[2]), pause=_VOLUME_SECONDS)
        if standing.job_uid:
            if standing.recreations >= MAX_RECREATIONS:
                message = f"the Job was deleted {MAX_RECREATIONS + 1} times; set spec.cancel to stop a conversion"
                return self.end(standing, Ending(reason="JobDeleted", message=message))
            standing = replace(standing, recreations=standing.recreations + 1, job_uid="")
        return self.create(standing, todo)

    def create(self, standing: Standing, todo: list[int]) -> Plan:
        """Ask for the Job, or say why the API server would not have it just now."""
        refusal = self.seen.refusal
        pinned = None if self.conversion.one_worker else self.agreed()
        manifest = build_job(
            # Stages are of one checkpoint, and a training may have saved another since the first was done.
            self.conversion.of_iteration(pinned),
            image=self.house.image,
            attempt=standing.attempt,
            stages=None if self.conversion.one_worker else todo,
            memory_percent=standing.memory_percent,
            ended=standing.follow_end,
        )
        if refusal is not None:
            ended = Ending(reason=refusal.reason, message=refusal.message)
            if refusal.reason == "InvalidSpec":
                return self.end(replace(standing, accepted=("False", refusal.reason, refusal.message)), ended)
            if refusal.reason not in REFUSALS:
                return self.end(standing, ended)
            waits = Obstacle(reason=refusal.reason, message=refusal.message)
            return self.held(standing, waits, pause=refusal.pause)
        refused, since = self.refused_before(), text(self.before, "pendingSince") or None
        started = standing.started or stamp(self.seen.now)
        standing = replace(standing, started=started, waits=refused, pending_since=since if refused else None)
        return self.plan(standing, CreateJob(manifest=manifest), again=WAIT_SECONDS)

    def refused_before(self) -> Obstacle | None:
        """Why there was no Job when it was asked for last: that is how it stands until there is one."""
        ready = condition(items(self.before, "conditions"), "Ready")
        refused = ready.get("reason") in REFUSALS
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
        again = WAIT_SECONDS if training and training.state == "Unknown" else None
        return self.plan(replace(standing, waits=found), again=again)

    def follow(self) -> None:
        """Notice how the training that is followed stands."""
        standing = awaits.recognised(self.standing, self.seen.training)
        self.standing = replace(standing, follow_end=awaits.follow_end(self.conversion, standing, self.seen.training))

    # ----------------------------------------------------------------------------------------------------- with a Job

    def with_job(self, job: Job) -> Plan:
        self.listen()
        self.standing = standing = replace(
            self.standing,
            started=self.standing.started or stamp(job.created or self.seen.now),
            volumes=volumes_ready(self.conversion, job, self.seen.claims),
        )
        if job.ending:
            return self.finished(job)
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
            return self.plan(standing, *actions, again=WAIT_SECONDS if self.alive else None)
        pods = [pod for pod in self.workers(job.uid) if not pod.gone]
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

    def finished(self, job: Job) -> Plan:
        """The Job is over: end, or give the stages that ran out of memory more of it."""
        standing = self.standing
        if self.is_behind():
            return self.plan(standing, again=1.0)
        if any(pod.job_uid == job.uid for pod in self.alive):
            # Before Kubernetes 1.31 a Job fails while its workers are told to stop.
            return self.wait(
                standing, Obstacle(reason="WaitingForPods", message="workers of the failed Job are ending")
            )
        if not self.left_out():
            return self.done()
        failed = [record for record in standing.records if record.state == "Failed"]
        starved = [record for record in failed if record.reason == OUT_OF_MEMORY]
        if starved and reason_of(job) == "StageFailed" and job.reason != "PodFailurePolicy":
            percent = -(-standing.memory_percent * (100 + self.conversion.spec.retries.memory_growth_percent) // 100)
            now, then = (grown_memory(self.conversion, p) for p in (standing.memory_percent, percent))
            if now is not None and then is not None and then > now:
                return self.another(percent, {record.stage for record in starved})
        if job.ending == "Complete" and not failed:
            return self.unreported()
        return self.end(standing, ending(self.conversion, job, self.workers(job.uid), failed))

    def unreported(self) -> Plan:
        """Nobody knows a report of some stages, because pods or a status were lost: a stage that is done ends at once."""
        if self.standing.recreations >= MAX_RECREATIONS:
            stages = ", ".join(str(record.stage) for record in self.standing.records if record.state != "Succeeded")
            message = (
                f"the pods of stage {stages} were gone before their reports were read, {MAX_RECREATIONS + 1} times"
            )
            hint = "see what deletes pods as soon as they have ended"
            return self.end(self.standing, Ending(reason=NO_REPORT, message=f"{message}; {hint}"))
        self.standing = replace(self.standing, recreations=self.standing.recreations + 1)
        return self.another(self.standing.memory_percent, set())

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
