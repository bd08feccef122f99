"""What may be changed of a Job while it is there, and what is said where it may not.  Pure.

Kueue decides when its Jobs run and how wide they are.  It stops a running Job that is not as it was admitted, and queues
it anew (kubernetes-sigs/kueue pkg/controller/jobframework/reconciler.go, ensureOneWorkload).
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt2pt.kube.conversion.job import parallelism
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt_operator.rules import volumes
from ckpt2pt_operator.rules.conditions import QUEUE_DECIDES, WORKERS_LIMITED, Verdict
from ckpt2pt_operator.rules.stages import Blocker
from ckpt2pt_operator.rules.views import Claim, Job

BY_USER = Blocker(reason="UserRequested", message="spec.suspend is true; set it to false to go on")

Claims = Mapping[str, Claim | None] | None


def changes(conversion: Conversion, job: Job, claims: Claims) -> Json:
    """The fields of its spec that are to be others."""
    spec: Json = {}
    if not job.queued:
        spec["suspend"] = conversion.spec.suspend
        spec["parallelism"] = _width(conversion, job, claims)[0]
    if not job.per_index:
        # Then all stages share one number of retries, and 6 by default.
        spec["backoffLimit"] = conversion.spec.retries.per_stage * job.completions
    have: Json = {"suspend": job.suspended, "parallelism": job.parallelism, "backoffLimit": job.backoff_limit}
    return {name: value for name, value in spec.items() if have[name] != value}


def volumes_ready(conversion: Conversion, job: Job, claims: Claims) -> Verdict:
    """The condition VolumesReady of the workers that there are, and why there are not more."""
    return _width(conversion, job, claims)[1]


def _width(conversion: Conversion, job: Job, claims: Claims) -> tuple[int, Verdict]:
    """Workers at a time, as many as the volumes can be shared by."""
    wanted, have = parallelism(conversion, job.completions), min(job.parallelism, job.completions)
    now = volumes.verdict(conversion, claims, have)
    wide = volumes.verdict(conversion, claims, wanted)
    if job.queued or wanted <= have or wide[0] != "False":
        return wanted, now
    if now[0] == "False":
        return have, now
    return have, (now[0], WORKERS_LIMITED, f"no more than {have} at a time: {wide[2]}")


def suspension(conversion: Conversion, job: Job, *, begun: bool) -> Blocker:
    """Why its workers are stopped."""
    if not job.queued:
        return BY_USER
    not_kept = "; spec.suspend does not keep it from that" if conversion.spec.suspend else ""
    if begun:
        message = f"the queue has taken the workers back; they go on when it lets them{not_kept}"
        return Blocker(reason="Preempted", message=message)
    queue = conversion.pod.get("queueName")
    return Blocker(reason="QueuedByKueue", message=f"queue {queue} has not admitted it yet{not_kept}")


def overridden_by_queue(conversion: Conversion, job: Job) -> Blocker | None:
    """What the spec asks of a Job that runs, and only its queue may do."""
    if not job.queued or job.suspended:
        return None
    said: list[str] = []
    if conversion.spec.suspend:
        said.append("spec.suspend does not stop it, spec.active: false of its Workload does")
    wanted = parallelism(conversion, job.completions)
    if wanted != min(job.parallelism, job.completions):
        said.append(f"spec.workers.maxParallelStages, {wanted}, counts for the next Job")
    queue = conversion.pod.get("queueName")
    return Blocker(reason=QUEUE_DECIDES, message=f"queue {queue} admitted it; {'; '.join(said)}") if said else None
