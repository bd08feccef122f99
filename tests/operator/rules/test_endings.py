"""An end says why, and how to go on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import StageRecord
from ckpt2pt_operator.rules.endings import ending, planned, reason_of
from ckpt2pt_operator.rules.views import Job, job_view, pod_view
from simulation import World


def a_job(**more: str) -> Job:
    world = World()
    world.run()
    return replace(job_view(world.jobs["demo-1"]), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("end", "reason", "reported"),
    [
        ("Complete", "CompletionsReached", "StageFailed"),
        ("Failed", "DeadlineExceeded", "ActiveDeadline"),
        ("Failed", "MaxFailedIndexesExceeded", "MaxFailedStages"),
        ("Failed", "BackoffLimitExceeded", "StageFailed"),
        ("Failed", "OfTomorrow", "OfTomorrow"),
        ("Failed", "", "JobFailed"),
    ],
)
def test_a_reason_of_a_job_in_our_words(end: str, reason: str, reported: str) -> None:
    assert reason_of(a_job(ending=end, reason=reason)) == reported


def test_failed_stages_are_named_with_the_first_ones_message_and_how_to_try_again() -> None:
    failed = [StageRecord(stage=n, state="Failed", reason="InputWrong", message="cut " * 400) for n in (1, 3)]
    found = ending(parse(World().document), a_job(ending="Failed", reason="FailedIndexes"), (), failed)
    assert found.reason == "StageFailed"
    assert found.message.startswith("stage 1, 3 failed; stage 1: InputWrong: cut")
    assert found.message.endswith("kubectl annotate ckc demo --overwrite ckpt2pt.dev/retry=$(date +%s)")
    assert len(found.message) < 1000


@pytest.mark.parametrize(("said", "reported"), [("no more room", "no more room"), ("", "the Job failed")])
def test_without_a_failed_stage_the_jobs_own_words_are_reported(said: str, reported: str) -> None:
    found = ending(parse(World().document), a_job(ending="Failed", reason="FailedIndexes", message=said), (), ())
    assert found.message == reported


def test_a_worker_that_refused_its_arguments_without_a_word_is_named() -> None:
    world = World()
    world.run()
    world.end(2, 64)
    pods = [pod_view(pod) for pod in world.pods.values()]
    found = ending(parse(world.document), a_job(ending="Failed", reason="PodFailurePolicy"), pods, ())
    assert (found.reason, "refused its arguments" in found.message) == ("InvalidSpec", True)


@pytest.mark.parametrize("reported", ["TargetConflict", "PermissionDenied", "ReadOnlyVolume", "VolumeTooSmall"])
def test_what_is_wrong_outside_of_the_document_is_reported_by_its_name_and_may_be_tried_again(reported: str) -> None:
    world = World()
    world.run()
    said = {"version": 1, "exitCode": 64, "reason": reported, "message": "what is wrong; where; run as uid 1000"}
    world.end(2, 64, report=json.dumps(said))
    pods = [pod_view(pod) for pod in world.pods.values()]
    found = ending(parse(world.document), a_job(ending="Failed", reason="PodFailurePolicy"), pods, ())
    assert found.reason == reported
    assert found.message.startswith(
        "what is wrong; where; run as uid 1000; correct it, then: kubectl annotate ckc demo"
    )


@pytest.mark.parametrize(
    "report", ["", "a log", '{"version": 1, "exitCode": 0}', '{"version": 1, "plan": {"bytes": "x"}}']
)
def test_a_dry_run_that_left_nothing_to_tell_is_no_mishap(report: str) -> None:
    world = World()
    world.run()
    world.end(0, report=report)
    found = planned([pod_view(pod) for pod in world.pods.values()])
    assert found == "" if "plan" not in report else found.startswith("0 files are planned: 0 B to read")


def test_room_that_nobody_knows_is_reported_as_such() -> None:
    world = World()
    world.run()
    world.end(0, report='{"version": 1, "plan": {"bytes": 5}}')
    assert "5 B to write with an unknown amount free" in planned([pod_view(pod) for pod in world.pods.values()])
