"""A training that is waited for is reported in test_plan.py; here it is followed, from its first checkpoint to its last."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ckpt2pt.kube.conversion.report import Report
from ckpt2pt_operator.rules.awaits import awaited
from ckpt2pt_operator.rules.seen import Training
from simulation import World
from statuses import check_status

Raw = dict[str, Any]
UNTIL = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
FOLLOW = ("spec.follow", {"until": UNTIL, "keep": 2})
RUNNING = Training(state="Running", uid="t")


def ready(world: World) -> tuple[str, str]:
    [found] = [item for item in world.status["conditions"] if item["type"] == "Ready"]
    return found["status"], found["reason"]


def degraded(world: World) -> str:
    [found] = [item for item in world.status["conditions"] if item["type"] == "Degraded"]
    return str(found["reason"]) if found["status"] == "True" else ""


def words(job: Raw) -> list[str]:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def following(*changes: tuple[str, object], training: Training | None = RUNNING) -> World:
    """A world in which the follower runs."""
    world = World(FOLLOW, *changes)
    world.training = training
    world.run()
    world.start(0)
    world.run(10)
    return world


def last_word(code: int = 0, **facts: object) -> str:
    return json.dumps(
        {"version": 1, "exitCode": code, "reason": "Converted", "message": "", "stages": [0, 1, 2, 3], **facts}
    )


def test_one_worker_follows_all_stages() -> None:
    world = following()
    [job] = world.made
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (1, 1)
    assert words(job)[0] == "watch"
    assert "--once" not in words(job)
    assert (world.phase, ready(world)) == ("Running", ("False", "Following"))
    assert world.status["trainingUID"] == "t"
    assert world.status["stageSummary"] == "0/1"
    check_status(world.status)


def test_the_last_that_is_converted_is_reported_while_it_runs_and_kept() -> None:
    world = following()
    [pod] = world.alive
    world.live[pod["metadata"]["uid"]] = Report(iteration=500, done=5, total=10)
    world.run(10)
    assert (world.status["iteration"], world.status["outputPath"]) == (500, "out/iter_0000500")
    world.live.clear()
    world.end(0, 137)
    world.run(10)
    assert world.status["iteration"] == 500


def test_a_checkpoint_that_cannot_be_converted_is_reported_and_the_next_one_is_waited_for() -> None:
    world = following()
    [pod] = world.alive
    world.live[pod["metadata"]["uid"]] = Report(iteration=500, reason="InputWrong", message="0_600: a shape is wrong")
    world.run(10)
    [stage] = world.status["stageStatuses"]
    assert (stage["state"], stage["reason"], stage["message"]) == ("Running", "InputWrong", "0_600: a shape is wrong")
    assert world.phase == "Running"


@pytest.mark.parametrize(
    ("training", "end"),
    [
        (Training(state="Succeeded", uid="t"), "Succeeded"),
        (Training(state="Failed", uid="t", message="BackoffLimitExceeded"), "Failed"),
        (Training(state="Missing"), "Deleted"),
    ],
)
def test_when_the_training_ends_one_last_look_is_taken(training: Training, end: str) -> None:
    world = following()
    world.training = training
    world.run(10)
    assert world.status["followEnd"] == end
    assert [job["metadata"]["name"] for job in world.made] == ["demo-1"], "one writer at a time"
    world.reap()
    world.run(10)
    last = world.made[-1]
    assert last["metadata"]["name"] == "demo-2"
    assert "--once" in words(last)
    assert ("--allow-incomplete" in words(last)) is (end != "Succeeded"), (
        "a failed training leaves its last save as it is"
    )
    world.training = Training(state="Missing")
    world.start(0)
    world.end(0, report=last_word(iteration=700))
    world.run(10)
    assert (world.phase, ready(world)) == ("Succeeded", ("True", "TrainingFollowed"))
    assert (world.status["iteration"], world.status["stageSummary"]) == (700, "1/1")
    assert len(world.made) == 2
    check_status(world.status)


def test_an_operator_that_dies_between_the_two_jobs_goes_on() -> None:
    world = following()
    world.training = Training(state="Succeeded", uid="t")
    world.step(dies=True)
    assert (world.status["followEnd"], list(world.jobs)) == ("Succeeded", ["demo-1"])
    world.step(dies=True)
    world.run(10)
    assert list(world.jobs) == [], "the follower is asked to stop, and is still there"
    world.reap()
    world.run(10)
    assert list(world.jobs) == ["demo-2"]


def test_a_training_that_has_ended_before_is_looked_at_once() -> None:
    world = World(FOLLOW)
    world.training = Training(state="Succeeded", uid="t")
    world.run()
    [job] = world.made
    assert (job["metadata"]["name"], "--once" in words(job)) == ("demo-1", True)


def test_one_that_is_not_there_yet_is_no_end() -> None:
    world = following(training=Training(state="Missing"))
    assert "followEnd" not in world.status
    assert (world.phase, len(world.made)) == ("Running", 1)


def test_a_last_look_that_fails_says_so_and_can_be_taken_again() -> None:
    world = World(FOLLOW)
    world.training = Training(state="Succeeded", uid="t")
    world.run()
    world.start(0)
    report = {"version": 1, "exitCode": 65, "reason": "InputWrong", "message": "rank_1 is at 0_400"}
    world.end(0, 65, report=json.dumps(report))
    world.run(10)
    assert world.phase == "Failed"
    [failed] = [item for item in world.status["conditions"] if item["type"] == "Failed"]
    assert "rank_1 is at 0_400" in failed["message"]
    world.retry("1")
    world.run(10)
    assert "--once" in words(world.made[-1])
    assert world.made[-1]["metadata"]["name"] == "demo-2"


def test_a_kind_that_nobody_watches_is_reported_while_it_is_followed() -> None:
    world = following(training=None)
    assert (world.phase, degraded(world)) == ("Running", "TrainingKindUnknown")


def test_without_a_training_it_goes_on_until_it_is_cancelled() -> None:
    world = following(("spec.follow", {}), training=None)
    assert (world.phase, degraded(world)) == ("Running", "")
    world.edit(cancel=True)
    world.run(1)
    world.reap()
    world.run(1)
    assert world.phase == "Cancelled"
    assert not world.jobs


def test_it_is_suspended_and_goes_on() -> None:
    world = following()
    world.edit(suspend=True)
    world.run(1)
    world.reap()
    world.run(1)
    assert world.phase == "Suspended"
    world.edit(suspend=False)
    world.run(1)
    world.start(0)
    world.run(1)
    assert (world.phase, len(world.made)) == ("Running", 1)


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        ({}, {}, {}),
        ({"startAfter": UNTIL}, {}, UNTIL),
        ({"startAfter": UNTIL}, {"startTime": "x"}, {}),
        ({"follow": {"until": UNTIL}}, {"startTime": "x"}, UNTIL),
        ({"follow": {"until": UNTIL}}, {"followEnd": "Failed"}, {}),
        ({"follow": {"until": UNTIL}, "dryRun": True}, {}, {}),
        ({"follow": {}}, {}, {}),
    ],
)
def test_whose_end_is_waited_for(spec: Raw, status: Raw, expected: Raw) -> None:
    assert awaited({"spec": spec, "status": status}) == expected
