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

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.job import build_job, grown_memory, job_name, parallelism
from ckpt2pt.kube.conversion.report import NO_REPORT, child, number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion, parse
from ckpt2pt.kube.conversion.status import TERMINAL, WAITING, Ending, StageRecord, disagreement
from ckpt2pt_operator.rules import awaits, permissions, volumes
from ckpt2pt_operator.rules.case import WAIT_SECONDS, Case
from ckpt2pt_operator.rules.changes import BY_USER, changes, overridden_by_queue, suspension, volumes_ready
from ckpt2pt_operator.rules.conditions import NOT_LOOKED, StatusInput, refused_document, stamp, still
from ckpt2pt_operator.rules.defaults import filled, life_left, of_pods
from ckpt2pt_operator.rules.endings import ending, reason_of
from ckpt2pt_operator.rules.kept import refused
from ckpt2pt_operator.rules.seen import (
    REFUSALS,
    Action,
    CreateJob,
    DeleteConversion,
    DeleteJob,
    OperatorDefaults,
    PatchJob,
    Plan,
    Seen,
)
from ckpt2pt_operator.rules.stages import OUT_OF_MEMORY, Blocker, refused_pods, setback, stuck_since
from ckpt2pt_operator.rules.views import Job, condition, items

MAX_RECREATIONS = 3
POLL_SECONDS = 10.0
"""How often a conversion with running workers is looked at for its progress."""
_VOLUME_SECONDS = 15.0


def conversion_of(document: Json, operator_defaults: OperatorDefaults) -> Conversion:
    """The document with the operator's defaults; UsageError where it is wrong."""
    if error := refused(document):
        raise error
    conversion = parse(filled(document, operator_defaults.pod))
    own = {name: value for name, value in conversion.pod.items() if value not in ({}, [], None)}
    if "queueName" not in own:
        own.pop("queueKind", None)  # an API server fills it in, and the queue of the house has a kind of its own
    pod = {**conversion.pod, **of_pods(operator_defaults.pod), **own}
    together = pod.pop("coSchedule", False) is True
    if "coSchedule" in child(document, "spec", "workers"):
        together = conversion.spec.workers.co_schedule
    workers = structs.replace(conversion.spec.workers, co_schedule=together)
    return replace(conversion, pod=pod, spec=structs.replace(conversion.spec, workers=workers))


def plan(seen: Seen, operator_defaults: OperatorDefaults) -> Plan:
    """Decide."""
    decided = _decide(seen, operator_defaults)
    over = decided.status.get("phase") in TERMINAL and decided.again is None and operator_defaults.deletes
    left = life_left(seen.conversion, decided.status, operator_defaults.pod, seen.now) if over else None
    if left is None:
        return decided
    if left > 0:
        return replace(decided, again=left)
    return replace(decided, actions=(DeleteConversion(),))


def _decide(seen: Seen, operator_defaults: OperatorDefaults) -> Plan:
    before = child(seen.conversion, "status")
    try:
        conversion = conversion_of(seen.conversion, operator_defaults)
    except UsageError as error:
        return _refused(seen, before, str(error).replace("\n", " "))
    case = _Case(seen, operator_defaults, conversion, before)
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
        return self.before.get("phase") == "Failed" and bool(self.token) and self.token != self.status_input.retry_token

    def again(self) -> Plan:
        """A new attempt, for the stages that are not done; it begins when nothing of the failed one works any more."""
        attempt = self.status_input.attempt + (1 if self.status_input.job_uid or self.job else 0)
        kept = disagreement(tuple(self.records.values())) is None
        records = tuple(
            record if record.state == "Succeeded" and kept else StageRecord(stage=record.stage)
            for record in self.records.values()
        )
        return self.plan(
            replace(
                self.status_input,
                records=records,
                attempt=attempt,
                job=job_name(self.conversion, attempt),
                job_uid="",
                recreations=0,
                retry_token=self.token,
                training_uid=self.status_input.training_uid if self.status_input.started else "",
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
            waits = Blocker(reason="Cancelling", message=f"{len(self.alive)} workers are asked to stop")
            deletions = [DeleteJob(job=job) for job in left if not job.deleted]
            return self.wait(self.status_input, waits, *deletions)
        if self.is_behind():
            return self.plan(self.status_input, again=1.0)
        if not self.left_out():
            return self.done()
        done = sum(record.state == "Succeeded" for record in self.status_input.records)
        message = f"spec.cancel was set; {done} of {len(self.records)} stages were done, and their files stay"
        unseen = ", ".join(str(record.stage) for record in self.status_input.records if record.state == "Running")
        if unseen:
            message += (
                f"; nobody saw how stage {unseen} ended, so it may be done too: see the report on the target volume"
            )
        return self.end(self.status_input, Ending(reason="Cancelled", message=message))

    # --------------------------------------------------------------------------------------------------- before a Job

    def without_job(self) -> Plan:
        self.listen()
        # A Job that is there was allowed when it was made, and goes on.  The operator's own defaults are the owner's words.
        refused = permissions.to_error(parse(self.seen.conversion), self.operator_defaults.allowed)
        if refused and self.todo() and not self.alive:
            status_input = replace(self.status_input, accepted=("False", "NotAllowed", refused))
            return self.end(status_input, Ending(reason="NotAllowed", message=refused))
        if self.conversion.spec.suspend:
            self.status_input = replace(self.status_input, suspended=BY_USER)
        status_input = self.status_input
        if status_input.started is None and self.conversion.spec.start_after is not None:
            held = self.training()
            if held is not None:
                return held
        self.follow()
        status_input = self.status_input
        earlier = [job for job in self.seen.jobs if job.attempt < status_input.attempt and not job.ending]
        if self.alive or earlier:
            # One writer for each stage.
            waits = Blocker(reason="WaitingForPods", message=f"{len(self.alive)} pods of an earlier Job are ending")
            return self.wait(status_input, waits, *(DeleteJob(job=job) for job in earlier if not job.deleted))
        todo = self.todo()
        if not todo:
            return self.done()  # the Job was deleted when it had nothing left to do
        workers = parallelism(self.conversion, 1 if self.conversion.one_worker else len(todo))
        verdict = volumes.verdict(self.conversion, self.seen.claims, workers)
        status_input = replace(status_input, volumes=verdict)
        if verdict[0] == "False":
            return self.held(status_input, Blocker(reason=verdict[1], message=verdict[2]), pause=_VOLUME_SECONDS)
        if status_input.job_uid:
            if status_input.recreations >= MAX_RECREATIONS:
                message = f"the Job was deleted {MAX_RECREATIONS + 1} times; set spec.cancel to stop a conversion"
                return self.end(status_input, Ending(reason="JobDeleted", message=message))
            status_input = replace(status_input, recreations=status_input.recreations + 1, job_uid="")
        return self.create(status_input, todo)

    def create(self, status_input: StatusInput, todo: list[int]) -> Plan:
        """Ask for the Job, or say why the API server would not have it just now."""
        to_error = self.seen.to_error
        pinned = None if self.conversion.one_worker else self.agreed()
        manifest = build_job(
            # Stages are of one checkpoint, and a training may have saved another since the first was done.
            self.conversion.of_iteration(pinned),
            image=self.operator_defaults.image,
            attempt=status_input.attempt,
            stages=None if self.conversion.one_worker else todo,
            memory_percent=status_input.memory_percent,
            ended=status_input.follow_end,
        )
        if to_error is not None:
            ended = Ending(reason=to_error.reason, message=to_error.message)
            if to_error.reason == "InvalidSpec":
                return self.end(replace(status_input, accepted=("False", to_error.reason, to_error.message)), ended)
            if to_error.reason not in REFUSALS:
                return self.end(status_input, ended)
            waits = Blocker(reason=to_error.reason, message=to_error.message)
            return self.held(status_input, waits, pause=to_error.pause)
        refused, since = self.refused_before(), text(self.before, "pendingSince") or None
        started = status_input.started or stamp(self.seen.now)
        status_input = replace(status_input, started=started, waits=refused, pending_since=since if refused else None)
        return self.plan(status_input, CreateJob(manifest=manifest), again=WAIT_SECONDS)

    def refused_before(self) -> Blocker | None:
        """Why there was no Job when it was asked for last: that is how it stands until there is one."""
        ready = condition(items(self.before, "conditions"), "Ready")
        refused = ready.get("reason") in REFUSALS
        return Blocker(reason=text(ready, "reason"), message=text(ready, "message")) if refused else None

    def training(self) -> Plan | None:
        """Wait for the training; None once it has succeeded."""
        training = self.seen.training
        status_input = awaits.pinned(self.status_input, training)
        found = awaits.start(self.conversion, status_input, training)
        if found is None:
            # From here on the training may be deleted.
            self.status_input = replace(status_input, started=stamp(self.seen.now))
            return None
        if isinstance(found, Ending):
            return self.end(status_input, found)
        # The training's own events bring it back; of a kind that nobody serves there are none.
        again = WAIT_SECONDS if training and training.state == "Unknown" else None
        return self.plan(replace(status_input, waits=found), again=again)

    def follow(self) -> None:
        """Notice how the training that is followed stands."""
        status_input = awaits.pinned(self.status_input, self.seen.training)
        self.status_input = replace(
            status_input, follow_end=awaits.follow_end(self.conversion, status_input, self.seen.training)
        )

    # ----------------------------------------------------------------------------------------------------- with a Job

    def with_job(self, job: Job) -> Plan:
        self.listen()
        self.status_input = status_input = replace(
            self.status_input,
            started=self.status_input.started or stamp(job.created or self.seen.now),
            volumes=volumes_ready(self.conversion, job, self.seen.claims),
        )
        if job.ending:
            return self.finished(job)
        if job.deleted:
            waits = Blocker(reason="JobDeleted", message="the Job is being deleted; it is recreated when it is gone")
            return self.wait(status_input, waits)
        self.follow()
        if self.status_input.follow_end != status_input.follow_end:
            # Its follower goes; one more Job takes the last look.
            return self.another(status_input.memory_percent, {0})
        status_input = replace(self.status_input, overridden_by_queue=overridden_by_queue(self.conversion, job))
        spec = changes(self.conversion, job, self.seen.claims)
        actions = [PatchJob(job=job, spec=spec)] if spec else []
        if job.suspended:
            begun = any(record.attempts or record.state != "Pending" for record in status_input.records)
            why = suspension(self.conversion, job, begun=begun)
            status_input = replace(status_input, suspended=why, degraded=self.blocker())
            return self.plan(status_input, *actions, again=WAIT_SECONDS if self.alive else None)
        pods = [pod for pod in self.workers(job.uid) if not pod.gone]
        refused = refused_pods(job, pods, self.seen.warnings)
        blocker = refused or self.blocker()
        since = stuck_since(job, pods, refused)
        if since is not None and self.left(since) <= 0:
            return self.end(replace(status_input, degraded=blocker), self.too_late(blocker), DeleteJob(job=job))
        waiting = next((r for r in status_input.records if r.state == "Running" and r.reason == WAITING), None)
        if waiting is not None:
            status_input = replace(status_input, waits=Blocker(reason=WAITING, message=waiting.message))
        degraded = blocker or setback(self.conversion, status_input.records)
        degraded = degraded or awaits.unfollowed(self.conversion, status_input, self.seen.training)
        if degraded is None and not job.per_index:
            degraded = Blocker(
                reason="PerIndexRetryUnsupported",
                message="this Kubernetes has no backoffLimitPerIndex (1.29 has): stages share their retries",
            )
        missing = 'persistentvolumeclaim "' in (blocker.message if blocker else "")
        if blocker and missing and "not found" in blocker.message:
            status_input = replace(status_input, volumes=("False", "PVCNotFound", blocker.message))
        wait = POLL_SECONDS if any(pod.running for pod in pods) else 15.0
        if since is not None:
            wait = max(min(wait, self.left(since)), 0.5)
        return self.plan(replace(status_input, degraded=degraded), *actions, again=wait)

    def finished(self, job: Job) -> Plan:
        """The Job is over: end, or give the stages that ran out of memory more of it."""
        status_input = self.status_input
        if self.is_behind():
            return self.plan(status_input, again=1.0)
        if any(pod.job_uid == job.uid for pod in self.alive):
            # Before Kubernetes 1.31 a Job fails while its workers are asked to stop.
            return self.wait(
                status_input, Blocker(reason="WaitingForPods", message="workers of the failed Job are ending")
            )
        if not self.left_out():
            return self.done()
        failed = [record for record in status_input.records if record.state == "Failed"]
        starved = [record for record in failed if record.reason == OUT_OF_MEMORY]
        if starved and reason_of(job) == "StageFailed" and job.reason != "PodFailurePolicy":
            percent = -(
                -status_input.memory_percent * (100 + self.conversion.spec.retries.memory_growth_percent) // 100
            )
            now, then = (grown_memory(self.conversion, p) for p in (status_input.memory_percent, percent))
            if now is not None and then is not None and then > now:
                return self.another(percent, {record.stage for record in starved})
        if job.ending == "Complete" and not failed:
            return self.unreported()
        return self.end(status_input, ending(self.conversion, job, self.workers(job.uid), failed))

    def unreported(self) -> Plan:
        """Nobody knows a report of some stages, because pods or a status were lost: a stage that is done ends at once."""
        if self.status_input.recreations >= MAX_RECREATIONS:
            stages = ", ".join(str(record.stage) for record in self.status_input.records if record.state != "Succeeded")
            message = (
                f"the pods of stage {stages} were gone before their reports were read, {MAX_RECREATIONS + 1} times"
            )
            hint = "see what deletes pods as soon as they have ended"
            return self.end(self.status_input, Ending(reason=NO_REPORT, message=f"{message}; {hint}"))
        self.status_input = replace(self.status_input, recreations=self.status_input.recreations + 1)
        return self.another(self.status_input.memory_percent, set())

    def another(self, percent: int, stages: set[int]) -> Plan:
        """A new attempt for these stages and those that nobody has done, with that much memory."""
        attempt = self.status_input.attempt + 1
        records = tuple(
            replace(record, state="Pending", attempts=0) if record.stage in stages else record
            for record in self.status_input.records
        )
        return self.plan(
            replace(
                self.status_input, records=records, attempt=attempt, job=job_name(self.conversion, attempt), job_uid="",
                memory_percent=percent,
            ),
            again=0.0,
        )  # fmt: skip
