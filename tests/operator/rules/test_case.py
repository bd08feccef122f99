"""A stage is done when its worker has reported it, and whatever ends a conversion, the last words are read first."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ckpt2pt_operator.rules.notes import notes
from ckpt2pt_operator.rules.seen import DeleteJob
from simulation import World, done
from statuses import check_status, reported


def ready(*changes: tuple[str, object]) -> World:
    """A world in which the workers of both stages run."""
    world = World(("spec.parallelism.pipeline", 2), *changes)
    world.run()
    world.start(0, 1)
    world.run(1)
    return world


def states(world: World) -> list[str]:
    check_status(world.status)
    return [item["state"] for item in world.status["stageStatuses"]]


def message(world: World, kind: str) -> str:
    [found] = [c["message"] for c in world.status["conditions"] if c["type"] == kind]
    return str(found)


def reasons(world: World) -> list[str]:
    pairs = zip([{}, *world.written], world.written, strict=False)
    return [note.reason for before, after in pairs for note in notes(before, after)]


def finish_and_reap(world: World, *reports: str | None) -> None:
    """The workers, asked to stop, end by themselves with exit code 0, or are killed, and their pods go at once."""
    for number, report in enumerate(reports):
        if report is not None:
            world.end(number, report=report)
    for pod in world.alive:
        world.finish(pod, 75)
    world.control()


# ------------------------------------------------------------------------------------------------- exit code 0 is no proof


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ("", "left no report of ckpt2pt in its termination message; see that spec.workers.image"),
        ("all fine\x1b[2J\n", "it left: all fine [2J"),
        (done([0]), "its report is of stages 0, not 1"),
        (done([1], exitCode=75), "its report says exit code 75"),
        (done([1], conversion="uid-of-another"), "of another conversion"),
        (done([1])[:-9], "left no report"),
        (done([1], reason="Planned"), "Planned"),
    ],
)
def test_exit_code_0_without_a_report_of_its_own_is_a_failed_stage(left: str, says: str) -> None:
    world = ready()
    world.end(0)
    world.end(1, report=left)
    world.run(9)
    assert (world.phase, states(world)) == ("Failed", ["Succeeded", "Failed"])
    assert reported(world.status, "Failed") == ("True", "StageFailed")
    assert reported(world.status, "Verified") == ("False", "NotYet")
    assert "stage 1: NoReport" in message(world, "Ready")
    assert says in world.status["stageStatuses"][1]["message"]
    assert "\x1b" not in json.dumps(world.status, ensure_ascii=False)
    assert "reportPath" not in world.status
    world.retry("1")
    world.run(1)
    assert world.jobs["demo-2"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "1"}
    world.end(1)
    world.run(9)
    assert world.phase == "Succeeded"


def test_a_stage_without_a_report_is_reported_while_the_others_go_on() -> None:
    world = ready()
    world.end(1, report="")
    world.run(1)
    assert (world.phase, states(world)) == ("Running", ["Running", "Failed"])
    assert reasons(world)[-1] == "StageFailed"


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        ("Digest", ["digest", "digest"], ("True", "DigestsMatch")),
        ("Digest", ["digest", "full"], ("True", "DigestsMatch")),
        ("Full", ["full", "full"], ("True", "SourceMatches")),
        ("Full", ["full", "digest"], ("Unknown", "NotReported")),
        ("Digest", ["digest", "none"], ("Unknown", "NotReported")),
        ("Digest", ["digest", None], ("Unknown", "NotReported")),
        ("None", ["none", "none"], ("False", "NotRequested")),
        ("None", ["full", "full"], ("False", "NotRequested")),
    ],
)
def test_verified_is_what_every_report_says(wanted: str, given: list[str | None], expected: tuple[str, str]) -> None:
    world = ready(("spec.verify", wanted))
    for number, level in enumerate(given):
        world.end(number, report=done([number], verified=level))
    world.run(9)
    assert world.phase == "Succeeded"
    assert reported(world.status, "Verified") == expected
    if expected[0] != "True":
        assert "read back" not in message(world, "Verified")
    if expected[0] == "Unknown":
        assert "stage 1 was verified" in message(world, "Verified")
    check_status(world.status)


def test_stages_of_different_iterations_are_no_checkpoint() -> None:
    """The training saved another one while the second worker began."""
    world = ready()
    world.end(0, report=done([0], iteration=500))
    world.end(1, report=done([1], iteration=510))
    world.run(9)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "IterationsDiffer"))
    assert message(world, "Ready").startswith("converted were iteration 500 of stage 0; iteration 510 of stage 1")
    world.retry("1")
    world.run(1)
    assert "annotations" not in world.jobs["demo-2"]["metadata"], "all stages are done again, where they are not done"


def words_of(job: dict[str, Any]) -> list[str]:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def test_a_later_attempt_converts_the_iteration_of_the_stages_that_are_done() -> None:
    world = ready()
    assert '"iteration"' not in words_of(world.jobs["demo-1"])[2]
    world.end(0, report=done([0], iteration=500))
    world.end(1, 65)
    world.run(9)
    world.retry("1")
    world.run(1)
    assert '"iteration":500' in words_of(world.jobs["demo-2"])[2]


# ------------------------------------------------------------------------------------------------- pods that nobody has seen


def test_a_pod_that_was_gone_before_it_was_seen_is_no_proof_and_its_stage_is_done_again() -> None:
    world = ready()
    world.end(0)
    world.control()
    world.lose_pods()
    assert world.jobs["demo-1"]["status"]["completedIndexes"] == "0"
    world.run(1)
    assert world.status["stageStatuses"][0]["state"] == "Running", "as it was seen last"
    world.end(1)
    world.run(1)
    world.run(9)
    assert states(world) == ["Pending", "Succeeded"]
    assert (world.status["attempt"], world.phase) == (2, "Running")
    assert world.jobs["demo-2"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "0"}
    assert "ReportLost" in reasons(world)
    world.end(0)
    world.run(9)
    assert (world.phase, reported(world.status, "Verified")[0]) == ("Succeeded", "True")


def test_pods_that_are_gone_again_and_again_end_it() -> None:
    world = World(("spec.parallelism.pipeline", 2))
    for _ in range(9):
        world.run(9)
        for pod in world.alive:
            world.finish(pod, 0)
        world.control()
        world.lose_pods()
    world.run(9)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "NoReport"))
    assert "the pods of stage 0, 1 were gone before their reports were read, 4 times" in message(world, "Ready")
    assert len(world.made) == 4


# ------------------------------------------------------------------------------------------------------------ the last words


def cancel(world: World) -> None:
    world.edit(cancel=True)
    decided = world.step()
    assert [type(action) for action in decided.actions] == [DeleteJob]


def delete(world: World) -> None:
    world.delete_job("demo-1")


def suspend(world: World) -> None:
    world.edit(suspend=True)
    world.step()
    world.control()


def miss_the_deadline(world: World) -> None:
    world.jobs["demo-1"]["ends"] = "DeadlineExceeded"
    world._end(world.jobs["demo-1"], "DeadlineExceeded")


def fail_another(world: World) -> None:
    """A Job that fails as a whole tells the other workers to stop."""
    world.jobs["demo-1"]["ends"] = "PodFailurePolicy"
    world._end(world.jobs["demo-1"], "PodFailurePolicy")


STOPS = pytest.mark.parametrize("stop", [cancel, delete, suspend, miss_the_deadline, fail_another])


@STOPS
def test_workers_that_were_stopped_when_they_had_published_have_succeeded(stop: Callable[[World], None]) -> None:
    world = ready()
    stop(world)
    finish_and_reap(world, done([0]), done([1]))
    world.run(1)
    world.run(9)
    assert (world.phase, states(world)) == ("Succeeded", ["Succeeded"] * 2)
    assert world.status["outputPath"] == "out/iter_0000500"
    assert (reported(world.status, "Complete"), reported(world.status, "Verified")[0]) == (
        ("True", "AllStagesSucceeded"),
        "True",
    )
    assert len(world.made) == 1


@STOPS
def test_a_stage_that_was_done_when_it_was_stopped_is_counted(stop: Callable[[World], None]) -> None:
    world = ready()
    stop(world)
    finish_and_reap(world, done([0]), None)
    world.run(1)
    world.run(9)
    assert states(world)[0] == "Succeeded"
    assert world.status["stageSummary"] == "1/2"
    if stop is cancel:
        assert world.phase == "Cancelled"
        assert message(world, "Ready") == "spec.cancel was set; 1 of 2 stages were done, and their files stay"
    if stop is delete:
        assert world.jobs["demo-1"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "1"}


@STOPS
def test_what_was_stopped_without_a_report_is_not_done(stop: Callable[[World], None]) -> None:
    world = ready()
    stop(world)
    finish_and_reap(world, "", None)
    world.run(1)
    world.run(9)
    assert states(world)[0] != "Succeeded"
    assert world.status["stageSummary"] == "0/2"


def test_of_a_stage_that_ended_while_no_operator_was_there_a_cancelled_conversion_says_so() -> None:
    world = ready()
    cancel(world)
    finish_and_reap(world, done([0]), done([1]))
    world.lose_pods()
    world.run(1)
    assert world.phase == "Cancelled"
    assert message(world, "Ready") == (
        "spec.cancel was set; 0 of 2 stages were done, and their files stay; nobody saw how stage 0, 1 ended, so it may be "
        "done too: see the report on the target volume"
    )


def test_the_operator_that_comes_back_reads_the_pods_that_are_still_there() -> None:
    """Their Job is gone: which stage a pod does is written on the pod."""
    world = ready()
    world.end(0)
    world.end(1, 65)
    world.run(9)
    world.retry("1")
    world.run(1)
    world.start(1)
    world.run(1)
    world.delete_job("demo-2")
    world.end(1)
    world.edit(cancel=True)
    world.step()
    assert (world.phase, states(world)) == ("Succeeded", ["Succeeded"] * 2)


def test_a_cancelled_job_that_has_just_ended_is_received_first() -> None:
    world = ready()
    world.end(0)
    world.end(1)
    world.control()
    hidden = {name: world.pods.pop(name) for name in list(world.pods)}
    world.edit(cancel=True)
    assert world.step().again == 1.0
    assert world.phase == "Running"
    world.pods |= hidden
    world.run(1)
    assert world.phase == "Succeeded"


def test_a_failed_job_is_not_over_while_its_workers_end() -> None:
    """Before Kubernetes 1.31 it says so while they are only asked to stop."""
    world = ready()
    job = world.jobs["demo-1"]
    job["status"]["conditions"] = [
        {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "lastTransitionTime": "2026-01-02T03:04:05Z"}
    ]
    world.run(30)
    assert (world.phase, reported(world.status, "Ready")) == ("Running", ("False", "WaitingForPods"))
    world.end(0)
    world.end(1)
    world.run(9)
    assert world.phase == "Succeeded"
