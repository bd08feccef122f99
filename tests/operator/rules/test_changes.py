"""What is changed of a Job, what is not, and what is said then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion, parse
from ckpt2pt_operator.rules.changes import Claims, changes, overridden_by_queue, suspension, volumes_ready
from ckpt2pt_operator.rules.views import Job, claim_view, job_view
from simulation import World, conversion

MANY: Claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}})}
ONCE: Claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteOnce"]}})}
NONE: Claims = {"training": None}


def a_job(**more: object) -> Job:
    world = World()
    world.run()
    return replace(job_view(world.jobs["demo-1"]), **more)  # type: ignore[arg-type]


def wants(*, suspend: bool = False, **workers: object) -> Conversion:
    return parse(conversion(("spec.suspend", suspend), ("spec.workers", workers)))


@pytest.mark.parametrize(
    ("wanted", "job", "claims", "patch"),
    [
        (wants(), {}, MANY, {}),
        (wants(suspend=True), {}, MANY, {"suspend": True}),
        (wants(), {"suspended": True}, MANY, {"suspend": False}),
        (wants(maxParallelStages=2), {}, MANY, {"parallelism": 2}),
        (wants(maxParallelStages=2), {}, ONCE, {"parallelism": 2}),
        (wants(maxParallelStages=3), {"parallelism": 1}, MANY, {"parallelism": 3}),
        (wants(maxParallelStages=3), {"parallelism": 1}, None, {"parallelism": 3}),
        (wants(maxParallelStages=3), {"parallelism": 1}, ONCE, {}),
        (wants(maxParallelStages=3, coSchedule=True), {"parallelism": 1}, ONCE, {"parallelism": 3}),
        (wants(maxParallelStages=3), {"parallelism": 1}, NONE, {}),
        (wants(suspend=True, maxParallelStages=2), {"queued": True}, MANY, {}),
        (wants(), {"per_index": False, "backoff_limit": 6}, MANY, {"backoffLimit": 12}),
        (wants(), {"per_index": False, "backoff_limit": 6, "queued": True, "parallelism": 2}, MANY, {"backoffLimit": 12}),
        (wants(), {"per_index": False, "backoff_limit": 12}, MANY, {}),
    ],
)  # fmt: skip
def test_changes(wanted: Conversion, job: dict[str, object], claims: Claims, patch: Json) -> None:
    assert changes(wanted, a_job(**job), claims) == patch


@pytest.mark.parametrize(
    ("job", "claims", "verdict"),
    [
        ({}, MANY, ("True", "Bound")),
        ({}, ONCE, ("False", "AccessModeConflict")),
        ({"parallelism": 1}, ONCE, ("True", "WorkersLimited")),
        ({"parallelism": 1}, NONE, ("False", "PVCNotFound")),
        ({"parallelism": 1, "queued": True}, ONCE, ("True", "Bound")),
    ],
)
def test_volumes_of_the_workers_that_there_are(
    job: dict[str, object], claims: Claims, verdict: tuple[str, str]
) -> None:
    assert volumes_ready(wants(), a_job(**job), claims)[:2] == verdict


@pytest.mark.parametrize(
    ("job", "begun", "suspend", "reason", "says"),
    [
        ({}, True, True, "UserRequested", "set it to false to go on"),
        ({"queued": True}, False, False, "QueuedByKueue", "queue night has not admitted it yet"),
        (
            {"queued": True},
            False,
            True,
            "QueuedByKueue",
            "not admitted it yet; spec.suspend does not keep it from that",
        ),
        ({"queued": True}, True, False, "Preempted", "when it lets them"),
        ({"queued": True}, True, True, "Preempted", "lets them; spec.suspend does not keep it from that"),
    ],
)
def test_why_workers_are_stopped(job: dict[str, object], begun: bool, suspend: bool, reason: str, says: str) -> None:
    found = suspension(wants(suspend=suspend, queueName="night"), a_job(suspended=True, **job), begun=begun)
    assert found.reason == reason
    assert found.message.endswith(says)


@pytest.mark.parametrize(
    ("wanted", "job", "says"),
    [
        (wants(suspend=True, queueName="night"), {}, None),
        (wants(queueName="night"), {"queued": True}, None),
        (wants(suspend=True, queueName="night"), {"queued": True, "suspended": True}, None),
        (wants(suspend=True, queueName="night"), {"queued": True}, "spec.active: false of its Workload does"),
        (
            wants(maxParallelStages=1, queueName="night"),
            {"queued": True},
            "maxParallelStages, 1, counts for the next Job",
        ),
    ],
)
def test_what_only_a_queue_may_do(wanted: Conversion, job: dict[str, object], says: str | None) -> None:
    found = overridden_by_queue(wanted, a_job(**job))
    assert (found is None) == (says is None)
    if found and says:
        assert found.reason == "QueueDecides"
        assert found.message.startswith("queue night admitted it; ")
        assert found.message.endswith(says)
