"""What the chart's worker.defaults give, and how long a finished conversion stays."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from ckpt2pt.kube.conversion.report import child
from ckpt2pt_operator.rules.defaults import filled, life_left, of_pods
from ckpt2pt_operator.rules.plan import conversion_of, plan
from ckpt2pt_operator.rules.seen import DeleteConversion, Seen
from simulation import HOUSE, START, World, conversion

Raw = dict[str, Any]
DEFAULTS: Raw = {
    "retries": {"perStage": 1, "maxMemory": "1Gi"},
    "pendingDeadlineSeconds": 60,
    "activeDeadlineSeconds": 7200,
    "ttlSecondsAfterFinished": 5,
    "timeToLiveSeconds": 100,
    "maxParallelStages": 2,
    "rankTimeoutSeconds": 30,
    "nodeSelector": {"disk": "fast"},
}
OWN = replace(HOUSE, pod=DEFAULTS)


def reported(document: Raw, operator_defaults: Any = OWN) -> tuple[object, ...]:
    found = conversion_of(document, operator_defaults)
    return (
        found.spec.retries.per_stage, found.spec.retries.memory_growth_percent, found.spec.retries.max_memory,
        found.spec.pending_deadline_seconds, found.spec.active_deadline_seconds, found.spec.ttl_seconds_after_finished,
        found.spec.workers.max_parallel_stages, found.spec.workers.rank_timeout_seconds, found.pod.get("nodeSelector"),
    )  # fmt: skip


def test_what_a_conversion_does_not_say_the_house_does() -> None:
    assert reported(conversion(), HOUSE) == (3, 50, None, 900, None, None, None, None, None)
    assert reported(conversion()) == (1, 50, "1Gi", 60, 7200, 5, 2, 30, {"disk": "fast"})


def test_what_a_conversion_says_counts_field_by_field() -> None:
    said = conversion(
        ("spec.retries", {"perStage": 3}), ("spec.pendingDeadlineSeconds", 900), ("spec.workers", {"maxParallelStages": 4})
    )  # fmt: skip
    assert reported(said) == (3, 50, "1Gi", 900, 7200, 5, 4, 30, {"disk": "fast"})
    assert set(of_pods(DEFAULTS)) == {"nodeSelector"}, "the rest is no field of a pod"


@pytest.mark.parametrize("spec", [None, "x", 3])
def test_a_spec_that_is_none_is_left_alone(spec: object) -> None:
    assert filled({"spec": spec}, DEFAULTS) == {"spec": spec}


@pytest.mark.parametrize(
    ("own", "operator_defaults", "left"),
    [(None, {}, None), (50, {}, 40.0), (None, DEFAULTS, 90.0), (5, DEFAULTS, -5.0), (0, {}, -10.0)],
)
def test_the_time_to_live_counts_from_the_end(own: int | None, operator_defaults: Raw, left: float | None) -> None:
    document: Raw = {"spec": {"timeToLiveSeconds": own}}
    status: Raw = {"completionTime": "2026-01-02T03:04:05Z"}
    assert life_left(document, status, operator_defaults, START + timedelta(seconds=10)) == left
    assert life_left(document, {}, operator_defaults, START) is None, "it has not finished"


def deletions(world: World, seconds: float, operator_defaults: Any = HOUSE) -> tuple[bool, float | None]:
    decided = plan(replace(world.look(), now=world.now + timedelta(seconds=seconds)), operator_defaults)
    return any(isinstance(action, DeleteConversion) for action in decided.actions), decided.again


@pytest.mark.parametrize(
    "changes",
    [(("spec.cancel", True),), (("spec.follow", {"keep": 1}), ("spec.cancel", True)), (("spec.model.numLayers", 5),)],
    ids=["cancelled", "follower", "invalid"],
)
def test_a_finished_conversion_is_deleted_in_its_time_and_not_before(changes: tuple[tuple[str, object], ...]) -> None:
    world = World(("spec.timeToLiveSeconds", 60), *changes)
    world.settle()
    assert world.phase in {"Cancelled", "Failed"}
    assert deletions(world, 59) == (False, 1.0)
    assert deletions(world, 60)[0]
    assert not deletions(world, 60, replace(HOUSE, deletes=False))[0], "the operator may not"


def test_one_that_runs_is_never_deleted() -> None:
    world = World(("spec.timeToLiveSeconds", 0))
    world.run()
    assert world.jobs
    assert not deletions(world, 100)[0]


def test_one_that_is_to_be_tried_again_is_not_deleted() -> None:
    world = World(("spec.timeToLiveSeconds", 60), ("spec.model.numLayers", 5))
    world.settle()
    assert world.phase == "Failed"
    world.document["spec"]["model"]["numLayers"] = 4
    world.document["metadata"]["annotations"] = {"ckpt2pt.dev/retry": "1"}
    assert not deletions(world, 60)[0]


def test_one_that_was_refused_unread_goes_in_the_time_of_the_house() -> None:
    finding = {"field": "spec", "what": "has 300000 bytes as JSON", "hint": "keep it to 262144 bytes"}
    document: Raw = {"metadata": conversion()["metadata"], "refused": finding}
    status = plan(Seen(conversion=document, now=START), OWN).status
    assert status["phase"] == "Failed"
    later = Seen(conversion=document | {"status": status}, now=START + timedelta(seconds=100))
    assert plan(later, OWN).actions == (DeleteConversion(),)
    assert child(document, "spec") == {}
