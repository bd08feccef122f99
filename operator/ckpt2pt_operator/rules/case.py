"""One conversion while it is decided on: what is known of it, and the ways in which a look at it ends.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import chain

from ckpt2pt.kube.conversion.job import job_name
from ckpt2pt.kube.conversion.report import child, number, report_of, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import TERMINAL, Ending, disagreement
from ckpt2pt_operator.rules.conditions import NOT_LOOKED, StatusInput, Verdict, stamp, status_document
from ckpt2pt_operator.rules.endings import RETRY_ANNOTATION, planned
from ckpt2pt_operator.rules.seen import Action, OperatorDefaults, Plan, Seen
from ckpt2pt_operator.rules.stages import Blocker, behind, observed, pod_obstacle, recorded
from ckpt2pt_operator.rules.views import Pod, condition, items, texts, time

WAIT_SECONDS = 30.0
_MOST_WARNINGS = 16
"""Different ones; those of several stages are often the same."""
_SETTLE = timedelta(seconds=5)
"""How long a finished Job may be ahead of its pods in what the API server sends."""


def _reported_of_volumes(before: Json) -> Verdict | None:
    """The condition as it was written: looking at claims is not part of every decision."""
    written = condition(items(before, "conditions"), "VolumesReady")
    for status in ("True", "False", "Unknown"):
        if written.get("status") == status:
            return status, text(written, "reason"), text(written, "message")
    return None


class Case:
    """What was seen, the records of the stages brought up to date with it, and how the conversion stands."""

    def __init__(self, seen: Seen, operator_defaults: OperatorDefaults, conversion: Conversion, before: Json) -> None:
        self.seen, self.operator_defaults, self.conversion, self.before = seen, operator_defaults, conversion, before
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
                if job.attempt < attempt:
                    self.records = observed(conversion, self.records, job, self.workers(job.uid), {})
        token = text(before, "retryToken", 253)
        if before.get("phase") not in TERMINAL:
            token = self.token or token  # whoever asks before there is a failure has to ask again
        self.alive = [pod for pod in seen.pods if not pod.over]
        self.status_input = StatusInput(
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
            warnings=texts(before, "warnings"),
            volumes=_reported_of_volumes(before) or NOT_LOOKED,
        )

    def workers(self, uid: str) -> list[Pod]:
        """The pods of a Job; one of the same name that was deleted may have left some."""
        return [pod for pod in self.seen.pods if pod.job_uid == uid]

    def listen(self) -> None:
        """Take in what the workers of this attempt say, the last words of those whose Job is gone as well."""
        uid = self.job.uid if self.job else self.status_input.job_uid
        if not uid:
            return
        pods = self.workers(uid)
        self.records = observed(self.conversion, self.records, self.job, pods, self.seen.live)
        said = (report.warnings for pod in pods if pod.exit_code == 0 and (report := report_of(pod.report)))
        warnings = tuple(dict.fromkeys([*self.status_input.warnings, *chain.from_iterable(said)]))
        self.status_input = replace(
            self.status_input, records=tuple(self.records.values()), job_uid=uid, iteration=self.iteration(pods),
            warnings=warnings[:_MOST_WARNINGS],
        )  # fmt: skip

    def is_behind(self) -> bool:
        """Whether the Job has ended just now, and its pods are about to be seen."""
        job = self.job
        if job is None or not job.ending or job.completed_at is None or self.seen.now - job.completed_at >= _SETTLE:
            return False
        return behind(job, self.workers(job.uid))

    def todo(self) -> list[int]:
        """The stages that are neither done nor given up."""
        return [stage for stage, record in self.records.items() if record.state not in {"Succeeded", "Failed"}]

    def iteration(self, pods: Sequence[Pod]) -> int | None:
        """What is done decides, then whatever workers say; before its checkpoint is whole one cannot tell."""
        if (done := self.agreed()) is not None:
            return done
        reports = [report for pod in pods for report in (report_of(pod.report), self.seen.live.get(pod.uid)) if report]
        return next((r.iteration for r in reports if r.iteration is not None), self.status_input.iteration)

    def agreed(self) -> int | None:
        """The iteration of the stages that are done."""
        return next((record.iteration for record in self.records.values() if record.iteration is not None), None)

    def left_out(self) -> bool:
        """Whether any stage is not done."""
        return any(record.state != "Succeeded" for record in self.status_input.records)

    # ----------------------------------------------------------------------------------------------- how a look ends

    def plan(self, status_input: StatusInput, *actions: Action, again: float | None = None) -> Plan:
        """It goes on."""
        status = status_document(
            self.conversion, status_input, before=self.before, generation=self.generation, now=self.seen.now
        )
        return Plan(status=status, actions=actions, again=again)

    def wait(self, status_input: StatusInput, waits: Blocker, *actions: Action) -> Plan:
        """Pods have to end first; a lost node may keep them, and only somebody who knows can do anything about it."""
        return self.plan(replace(status_input, waits=waits, degraded=self.blocker()), *actions, again=WAIT_SECONDS)

    def blocker(self) -> Blocker | None:
        """What keeps its pods from running."""
        return pod_obstacle(self.seen.pods, self.seen.warnings, self.seen.now)

    def end(self, status_input: StatusInput, ended: Ending | None, *actions: Action) -> Plan:
        """It is over; ``ended`` says why, where not every stage is done."""
        records = tuple(
            replace(record, state="Pending") if record.state == "Running" else record for record in status_input.records
        )
        over = replace(status_input, ended=ended, finished=stamp(self.seen.now), records=records, pending_since=None)
        return self.plan(over, *actions)

    def done(self) -> Plan:
        """Every stage is done; that is a success if they are of one checkpoint."""
        differ = disagreement(self.status_input.records)
        found = planned(self.seen.pods) if self.conversion.spec.dry_run else ""
        return self.end(replace(self.status_input, planned=found), differ)

    def held(self, status_input: StatusInput, blocker: Blocker, *, pause: float) -> Plan:
        """No worker can be asked for: wait, but not for ever where nobody has suspended it."""
        if status_input.suspended:
            return self.plan(replace(status_input, waits=blocker), again=pause)
        since = time(self.before, "pendingSince") or self.seen.now
        left = self.left(since)
        if left <= 0:
            return self.end(replace(status_input, degraded=blocker), self.too_late(blocker))
        return self.plan(replace(status_input, waits=blocker, pending_since=stamp(since)), again=min(left, pause))

    def left(self, since: datetime) -> float:
        """Seconds until the pending deadline."""
        waited = (self.seen.now - since).total_seconds()
        return self.conversion.spec.pending_deadline_seconds - waited

    def too_late(self, blocker: Blocker | None) -> Ending:
        """The end of one that could not begin in time."""
        seconds = self.conversion.spec.pending_deadline_seconds
        why = f"{blocker.reason}: {blocker.message}" if blocker else "no reason is known"
        return Ending(reason="PendingDeadline", message=f"no worker could start for {seconds} s; {why}")
