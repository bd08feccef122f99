"""What a decision is made from, and what it is: values only.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from ckpt2pt.kube.conversion.report import Report
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.rules.views import Claim, Job, Pod


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorDefaults:
    """What the operator adds to every conversion: the image, and what a conversion does not say itself (``pod``).

    ``allowed`` are the ``permissions.PERMISSIONS`` that a conversion has.
    """

    image: str
    pod: Json = field(default_factory=dict[str, object])
    allowed: frozenset[str] = frozenset()
    deletes: bool = True
    """Whether finished conversions are deleted when their time is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The workload that ``spec.startAfter`` names: Running, Succeeded, Failed, Missing, Unknown or Unwatched.

    ``message`` of one that is Unwatched lists the kinds that are watched.
    """

    state: str
    uid: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why the API server did not take the Job just now; ``pause`` is the time until it is asked again, in seconds."""

    reason: str
    message: str
    pause: float = 30.0


REFUSALS = frozenset({"QuotaExceeded", "JobRefused", "JobNotCreated"})
"""Reasons that may pass: a quota, a policy or a webhook, an API server that is busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Everything that is known of a conversion; ``live`` and ``warnings`` are by uid."""

    conversion: Json
    now: datetime
    jobs: Sequence[Job] = ()
    pods: Sequence[Pod] = ()
    claims: Mapping[str, Claim | None] | None = None
    live: Mapping[str, Report] = field(default_factory=dict[str, Report])
    warnings: Mapping[str, str] = field(default_factory=dict[str, str])
    training: Training | None = None
    to_error: Refusal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateJob:
    """Create it; one that is there already and has the same owner is as good."""

    manifest: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchJob:
    """Merge ``spec`` into that very Job."""

    job: Job
    spec: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    """Delete that very Job and its pods."""

    job: Job


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteConversion:
    """Delete the conversion that was looked at, if it is still as it was, and all that it owns."""


Action = CreateJob | PatchJob | DeleteJob | DeleteConversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``status`` first, if it is new; then ``actions``; look again after ``again`` seconds, or when something changes."""

    status: Json
    actions: tuple[Action, ...] = ()
    again: float | None = None


def wants_warnings(seen: Seen) -> tuple[str, ...]:
    """Uids of the Jobs and pods whose warning events would tell why nothing happens; three at most."""
    late = seen.now - timedelta(seconds=10)
    idle = [
        job.uid
        for job in seen.jobs
        if not job.ending and not job.suspended and (job.started or job.created or seen.now) < late
        and not any(pod.job_uid == job.uid and not pod.over for pod in seen.pods)
    ]  # fmt: skip
    stuck = [
        pod.uid
        for pod in seen.pods
        if pod.node and not pod.over and pod.started is None and (pod.created or seen.now) < late
    ]
    return tuple(idle + stuck)[:3]
