"""Each row of the failure matrix (docs/operator.md), in a world without a cluster."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from ckpt2pt.kube.conversion.report import Report
from ckpt2pt_operator.rules.notes import notes
from ckpt2pt_operator.rules.plan import conversion_of
from ckpt2pt_operator.rules.seen import CreateJob, DeleteJob, OperatorDefaults, PatchJob, Refusal, Training
from ckpt2pt_operator.rules.views import claim_view
from simulation import World, conversion, done
from statuses import check_status, kstatus, reported

MEMORY = ("spec.workers.resources", {"limits": {"memory": "256Mi"}})
ONE_TRY = ("spec.retries", {"perStage": 0})


def ready(*changes: tuple[str, object]) -> World:
    """A world in which the workers of all four stages run."""
    world = World(*changes)
    world.run()
    world.start(0, 1, 2, 3)
    world.run(1)
    return world


def states(world: World) -> list[str]:
    return [item["state"] for item in world.status["stageStatuses"]]


def stage(world: World, number: int) -> dict[str, Any]:
    found: dict[str, Any] = world.status["stageStatuses"][number]
    return found


def report(code: int, message: str, **more: object) -> str:
    words = {65: "InputWrong", 64: "WrongUsage", 75: "TryAgain"}
    return json.dumps({"version": 1, "exitCode": code, "reason": words.get(code, "Bug"), "message": message, **more})


def reasons(world: World) -> list[str]:
    """Reasons of the events of its life."""
    pairs = zip([{}, *world.written], world.written, strict=False)
    return [note.reason for before, after in pairs for note in notes(before, after)]


# --------------------------------------------------------------------------------------------------------- the good road


def test_a_conversion_from_its_first_look_to_its_end() -> None:
    world = World()
    first = world.step()
    assert world.phase == "Pending"
    assert [type(action) for action in first.actions] == [CreateJob]
    world.run()
    assert world.status["job"] == "demo-1"
    assert len(world.alive) == 4
    world.start(0, 1, 2, 3)
    world.run(5)
    assert world.phase == "Running"
    assert reported(world.status, "Reconciling") == ("True", "InProgress")
    for number in range(4):
        world.end(number, report=done([number], bytes=7, bytesTotal=7))
    world.run(5)
    assert world.phase == "Succeeded"
    assert (world.status["progress"], world.status["stageSummary"], world.status["bytesDone"]) == ("100%", "4/4", 28)
    assert world.status["outputPath"] == "out/iter_0000500"
    assert world.status["reportPath"] == "out/iter_0000500/.ckpt2pt/report.json"
    assert reported(world.status, "Complete") == ("True", "AllStagesSucceeded")
    assert reported(world.status, "Verified") == ("True", "DigestsMatch")
    assert reported(world.status, "Failed")[0] == "False"
    assert reasons(world) == ["JobCreated", "AllStagesSucceeded"]
    check_status(world.status)


def test_what_workers_warn_of_is_reported_once_and_stays() -> None:
    world = World()
    world.run()
    for number in range(4):
        world.start(number)
        world.end(
            number,
            report=done(
                [number], warnings=["no-op layers beyond the model", *(["rank 3 is odd"] if number == 3 else [])]
            ),
        )
        world.run()
    check_status(world.status)
    assert world.phase == "Succeeded"
    assert world.status["warnings"] == ["no-op layers beyond the model", "rank 3 is odd"]
    world.pods.clear()
    world.jobs.clear()
    world.run()
    assert len(world.status["warnings"]) == 2


def test_not_too_many_warnings_are_reported() -> None:
    world = World()
    world.run()
    for number in range(4):
        world.start(number)
        world.end(number, report=done([number], warnings=[f"{number}{letter}" for letter in "abcdefgh"]))
        world.run()
    check_status(world.status)
    assert world.status["warnings"] == [f"{number}{letter}" for number in range(4) for letter in "abcd"]


def test_what_a_worker_said_before_it_knew_the_iteration_does_not_hide_it() -> None:
    world = ready()
    world.live = {pod["metadata"]["uid"]: Report(message="waiting for ranks") for pod in world.alive}
    world.run(1)
    assert "iteration" not in world.status
    for number in range(4):
        world.end(number)
    world.run(5)
    assert world.status["iteration"] == 500
    assert world.status["outputPath"] == "out/iter_0000500"


def test_workers_that_wait_for_a_checkpoint_say_so_where_one_looks() -> None:
    world = ready()
    why = "the checkpoint is incomplete: rank_3 has nothing yet"
    world.live = {pod["metadata"]["uid"]: Report(reason="WaitingForCheckpoint", message=why) for pod in world.alive}
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "WaitingForCheckpoint")
    assert stage(world, 0)["message"] == why
    assert reported(world.status, "Degraded") == ("False", "AsExpected"), "nothing is wrong"
    assert reported(world.status, "Stalled")[0] == "False"
    assert reasons(world)[-1] == "WaitingForCheckpoint"
    world.live = {pod["metadata"]["uid"]: Report(done=1, total=9) for pod in world.alive}
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "InProgress")
    assert "message" not in stage(world, 0)
    check_status(world.status)


def test_a_plan_needs_one_worker_and_ends_as_planned() -> None:
    world = World(("spec.dryRun", True))
    world.run()
    assert len(world.alive) == 1
    found = {"files": 24, "bytes": 3 << 30, "memory": 96 << 20, "freeSpace": 5 << 40, "ranks": 8}
    world.end(0, report=world.report(world.worker(0), bytesTotal=7 << 29, iteration=2, plan=found))
    world.run(9)
    assert world.phase == "Planned"
    said = {c["type"]: c["message"] for c in world.status["conditions"]}
    assert said["Ready"] == said["Complete"]
    assert said["Ready"] == (
        "24 files are planned: 3.5 GiB to read, 3.0 GiB to write with 5.0 TiB free, at most 96.0 MiB of memory for a "
        "worker; nothing was written"
    )
    check_status(world.status)
    assert reported(world.status, "Verified") == ("False", "NotRequested")


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_an_operator_that_dies_after_any_write_goes_on_where_it_was(looks: int) -> None:
    world = World()
    for _ in range(looks):
        world.step(dies=True)
        world.now = world.now.replace(minute=world.now.minute + 1)
    world.run()
    assert [job["metadata"]["name"] for job in world.made] == ["demo-1"]


def test_an_operator_that_was_down_finds_the_end() -> None:
    world = World()
    world.run()
    for _ in range(3):
        world.control()
    for number in range(4):
        world.end(number)
    world.control()
    world.now = world.now.replace(hour=9)
    world.run()
    assert world.phase == "Succeeded"


def test_a_lost_status_is_found_again_in_the_jobs() -> None:
    world = ready(ONE_TRY)
    world.end(2, 65)
    for number in (0, 1, 3):
        world.end(number)
    world.run(9)
    world.retry("1")
    world.run(9)
    assert world.jobs["demo-2"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "2"}
    world.document["status"] = {}
    world.end(2)
    world.run(9)
    assert states(world) == ["Succeeded"] * 4
    assert world.phase == "Succeeded"


def test_stages_nobody_has_recorded_are_done_by_another_attempt() -> None:
    world = ready(ONE_TRY)
    world.end(2, 65)
    for number in (0, 1, 3):
        world.end(number)
    world.run(9)
    world.retry("1")
    world.run(9)
    world.end(2)
    world.control()
    del world.jobs["demo-1"]
    world.document["status"] = {}
    world.run(9)
    assert world.phase in {"Pending", "Running"}
    assert world.jobs["demo-3"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "0,1,3"}


# ------------------------------------------------------------------------------------------------- defaults of the house

VOLCANO = {"queueName": "operator_defaults", "queueKind": "Volcano"}


@pytest.mark.parametrize(
    ("operator_defaults", "own", "expected"),
    [
        (VOLCANO, {}, ("operator_defaults", "Volcano")),
        (VOLCANO, {"queueKind": "Kueue"}, ("operator_defaults", "Volcano")),
        (VOLCANO, {"queueName": "own", "queueKind": "Kueue"}, ("own", "Kueue")),
        ({"queueName": "operator_defaults"}, {"queueKind": "Kueue"}, ("operator_defaults", "Kueue")),
        ({}, {"queueName": "own", "queueKind": "Volcano"}, ("own", "Volcano")),
        ({}, {"queueKind": "Kueue"}, (None, "Kueue")),
    ],
)
def test_the_queue_of_the_house_comes_with_its_kind(
    operator_defaults: dict[str, object], own: dict[str, object], expected: tuple[str | None, str]
) -> None:
    """An API server gives every conversion a kind, whether it asks for a queue or not."""
    pod = conversion_of(conversion(("spec.workers", own)), OperatorDefaults(image="i", pod=operator_defaults)).pod
    assert (pod.get("queueName"), pod["queueKind"]) == expected


@pytest.mark.parametrize(
    ("operator_defaults", "own", "expected"),
    [
        ({"coSchedule": True}, {}, True),
        ({"coSchedule": True}, {"coSchedule": False}, False),
        ({"coSchedule": False}, {"coSchedule": True}, True),
        ({}, {}, False),
    ],
)
def test_workers_are_kept_together_as_the_house_or_the_conversion_says(
    operator_defaults: dict[str, object], own: dict[str, object], expected: bool
) -> None:
    found = conversion_of(conversion(("spec.workers", own)), OperatorDefaults(image="i", pod=operator_defaults))
    assert found.spec.workers.co_schedule is expected
    assert "coSchedule" not in found.pod


# ----------------------------------------------------------------------------------------------------------- Job deleted


def test_a_deleted_job_is_made_anew_without_the_stages_that_are_done() -> None:
    world = ready()
    world.end(0)
    world.run(1)
    world.delete_job("demo-1")
    world.run(1)
    assert "WaitingForPods" in reported(world.status, "Ready")
    assert len(world.made) == 1
    world.reap()
    world.run(1)
    assert len(world.made) == 2
    assert world.jobs["demo-1"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "1,2,3"}
    assert stage(world, 0)["state"] == "Succeeded"
    assert world.status["jobRecreations"] == 1
    assert "JobRecreated" in reasons(world)


def test_a_job_that_is_deleted_again_and_again_is_given_up() -> None:
    world = World()
    for _ in range(4):
        world.run()
        world.delete_job("demo-1")
        world.reap()
    world.run()
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "JobDeleted"))
    assert len(world.made) == 4


def test_a_job_deleted_when_its_stages_were_done_leaves_nothing_to_do() -> None:
    world = ready()
    for number in range(4):
        world.end(number)
    job = world.jobs["demo-1"]
    world.control()
    job["status"].pop("conditions")
    world.step()
    assert states(world) == ["Succeeded"] * 4
    world.delete_job("demo-1")
    world.run(1)
    assert world.phase == "Succeeded"
    assert len(world.made) == 1


def test_pods_of_a_deleted_job_say_nothing_about_the_next_one() -> None:
    world = ready()
    world.end(1, 64, report=report(64, "from before"))
    old = dict(world.pods)
    world.delete_job("demo-1")
    world.reap()
    world.run(1)
    world.pods |= {name: pod for name, pod in old.items() if pod["status"]["phase"] == "Failed"}  # as --cascade=orphan
    for number in range(4):
        world.end(number)
    job = world.jobs["demo-1"]
    world._control(job)
    world.step()
    world.now = world.now.replace(hour=4)
    world.settle()
    assert world.phase == "Succeeded"


def test_a_job_that_is_gone_after_the_end_is_no_news() -> None:
    world = ready()
    for number in range(4):
        world.end(number)
    world.run(9)
    writes = len(world.written)
    world.delete_job("demo-1")
    world.run(100)
    assert (world.phase, len(world.written), len(world.made)) == ("Succeeded", writes, 1)


# --------------------------------------------------------------------------------------------------------- spec changes


def test_suspend_and_resume() -> None:
    world = ready()
    world.edit(suspend=True)
    world.run(1)
    assert world.jobs["demo-1"]["spec"]["suspend"] is True
    assert (world.phase, reported(world.status, "Suspended")) == ("Suspended", ("True", "UserRequested"))
    world.reap()
    world.edit(suspend=False)
    world.run(10_000)
    assert world.phase != "Failed"
    assert reported(world.status, "Suspended") == ("False", "Resumed")
    assert len(world.alive) == 4
    assert world.status["observedGeneration"] == 3


def test_a_conversion_that_was_born_suspended_has_its_whole_pending_time_when_it_resumes() -> None:
    world = World(("spec.suspend", True))
    world.run()
    assert world.phase == "Suspended"
    world.now = world.now.replace(hour=world.now.hour + 5)
    world.edit(suspend=False)
    world.settle()  # before the Job controller has noticed
    assert world.phase == "Pending"
    assert world.jobs["demo-1"]["spec"]["suspend"] is False


def test_one_that_is_suspended_waits_for_its_claim_as_long_as_its_user_likes() -> None:
    world = World(("spec.suspend", True))
    world.claims = {"training": None}
    decided = world.run()
    assert (world.phase, reported(world.status, "Suspended")) == ("Suspended", ("True", "UserRequested"))
    assert reported(world.status, "VolumesReady") == ("False", "PVCNotFound")
    assert reported(world.status, "Stalled")[0] == "False"
    assert decided.again == 15.0
    world.run(5 * 3600)
    assert world.phase == "Suspended"
    world.edit(suspend=False)
    world.run(1)
    assert (world.phase, reported(world.status, "Ready")) == ("Pending", ("False", "PVCNotFound"))
    world.run(890)
    assert world.phase == "Pending", "it has its whole pending time"
    world.edit(suspend=True)
    world.run(1)
    world.run(5 * 3600)
    world.edit(suspend=False)
    world.run(890)
    assert world.phase == "Pending"
    world.run(890)
    world.run(20)
    assert reported(world.status, "Failed") == ("True", "PendingDeadline")


def test_one_that_is_suspended_while_it_waits_for_its_training_says_so() -> None:
    world = World(AFTER, ("spec.suspend", True))
    world.training = Training(state="Running", uid="t")
    world.run()
    assert (world.phase, reported(world.status, "Suspended")) == ("Suspended", ("True", "UserRequested"))
    world.training = Training(state="Succeeded", uid="t")
    world.run(1)
    assert (world.phase, len(world.made), world.alive) == ("Suspended", 1, [])
    assert reasons(world) == ["UserRequested", "JobCreated"]
    check_status(world.status)


def test_fewer_workers_at_a_time() -> None:
    world = ready()
    world.document["spec"]["workers"] = {"maxParallelStages": 2}
    decided = world.step()
    assert [action.spec for action in decided.actions if isinstance(action, PatchJob)] == [{"parallelism": 2}]
    assert not world.step().actions


def test_a_queue_decides_for_itself() -> None:
    world = World(("spec.workers", {"queueName": "night"}))
    world.step()
    job = world.jobs["demo-1"]
    job["spec"]["suspend"] = True
    world.run(1)
    assert (world.phase, reported(world.status, "Suspended")) == ("Queued", ("True", "QueuedByKueue"))
    job["spec"] |= {"suspend": False, "parallelism": 2}
    world.run(10_000)
    assert world.phase == "Pending"
    assert job["spec"]["parallelism"] == 2
    world.start(0, 1)
    world.run(1)
    job["spec"]["suspend"] = True
    world.run(1)
    assert reported(world.status, "Suspended") == ("True", "Preempted")


def test_what_only_a_queue_may_do_is_said_where_it_is_asked_for() -> None:
    world = World(("spec.workers", {"queueName": "night"}))
    world.step()
    job = world.jobs["demo-1"]
    world.run(1)
    world.start(0, 1, 2, 3)
    world.run(1)
    assert reported(world.status, "Suspended") == ("False", "Resumed")
    world.edit(suspend=True)
    world.document["spec"]["workers"]["maxParallelStages"] = 2
    world.run(1)
    assert (job["spec"].get("suspend"), job["spec"]["parallelism"]) == (None, 4), "they are the queue's"
    assert (world.phase, reported(world.status, "Suspended")) == ("Running", ("False", "QueueDecides"))
    assert reasons(world)[-1] == "QueueDecides"
    job["spec"]["suspend"] = True
    world.run(1)
    assert reported(world.status, "Suspended") == ("True", "Preempted")
    world.edit(suspend=False)
    del world.document["spec"]["workers"]["maxParallelStages"]
    job["spec"]["suspend"] = False
    world.reap()
    world.run(1)
    world.start(0, 1, 2, 3)
    world.run(1)
    assert reported(world.status, "Suspended") == ("False", "Resumed")
    check_status(world.status)


def test_cancel_waits_for_the_workers_and_keeps_what_is_done() -> None:
    world = ready()
    world.end(0)
    world.control()
    world.edit(cancel=True)
    decided = world.step()
    assert [type(action) for action in decided.actions] == [DeleteJob]
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "Cancelling")
    world.reap()
    world.run(1)
    assert (world.phase, reported(world.status, "Failed")) == ("Cancelled", ("True", "Cancelled"))
    assert states(world) == ["Succeeded", "Pending", "Pending", "Pending"]


def test_cancel_before_anything_has_begun() -> None:
    world = World(("spec.cancel", True))
    world.run()
    assert world.phase == "Cancelled"
    assert "startTime" not in world.status
    assert not world.made


@pytest.mark.parametrize("ttl", [0, 60])
def test_time_to_live_is_set_after_the_results_are_recorded(ttl: int) -> None:
    world = ready(("spec.ttlSecondsAfterFinished", ttl))
    assert "ttlSecondsAfterFinished" not in world.jobs["demo-1"]["spec"]
    for number in range(4):
        world.end(number)
    world.run(9)
    assert world.jobs["demo-1"]["spec"]["ttlSecondsAfterFinished"] == ttl


# --------------------------------------------------------------------------------------------------------------- volumes


def test_a_missing_claim_is_waited_for_but_not_for_ever() -> None:
    world = World()
    world.claims = {"training": None}
    decided = world.run()
    assert not world.made
    assert decided.again is not None
    assert reported(world.status, "VolumesReady") == ("False", "PVCNotFound")
    assert reported(world.status, "Stalled") == ("True", "PVCNotFound")
    assert reasons(world) == ["PVCNotFound"]
    world.run(800)
    assert world.phase == "Pending"
    world.run(200)
    assert reported(world.status, "Failed") == ("True", "PendingDeadline")
    world.claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}})}
    world.retry("again")
    world.run(5)
    assert len(world.made) == 1


def test_a_retry_has_its_whole_pending_time() -> None:
    world = World()
    world.claims = {"training": None}
    world.run()
    world.run(1000)
    assert world.phase == "Failed"
    world.retry("again")
    world.run(1)
    assert world.phase == "Pending"


def test_a_claim_that_comes_late_is_used() -> None:
    world = World()
    world.claims = {"training": None}
    world.run()
    world.claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}})}
    world.run(60)
    assert len(world.made) == 1
    assert reported(world.status, "VolumesReady") == ("True", "Bound")


def test_a_claim_for_one_node_conflicts_with_many_workers() -> None:
    world = World()
    world.claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteOnce"]}})}
    world.run()
    assert reported(world.status, "VolumesReady") == ("False", "AccessModeConflict")
    world.document["spec"]["workers"] = {"maxParallelStages": 1}
    world.run(1)
    assert len(world.alive) == 1


def test_workers_do_not_become_more_than_a_claim_can_serve() -> None:
    world = World(("spec.workers", {"maxParallelStages": 1}))
    world.claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteOnce"]}})}
    world.run()
    world.start(0)
    world.run(1)
    assert reported(world.status, "VolumesReady") == ("True", "Bound")
    world.document["spec"]["workers"] = {"maxParallelStages": 4}
    world.run(1)
    assert world.jobs["demo-1"]["spec"]["parallelism"] == 1
    assert reported(world.status, "VolumesReady") == ("True", "WorkersLimited")
    assert reported(world.status, "Stalled")[0] == "False", "the worker goes on"
    assert reasons(world)[-1] == "WorkersLimited"
    [said] = [c["message"] for c in world.status["conditions"] if c["type"] == "VolumesReady"]
    assert said.startswith("no more than 1 at a time: persistentvolumeclaim training is ReadWriteOnce, and 4 workers")
    world.claims = {"training": claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}})}
    world.run(1)
    assert world.jobs["demo-1"]["spec"]["parallelism"] == 4
    assert reported(world.status, "VolumesReady") == ("True", "Bound")


def test_a_missing_claim_is_known_from_a_pod_where_claims_may_not_be_read() -> None:
    world = World()
    world.claims = None
    world.run()
    for pod in world.alive:
        message = '0/1 nodes are available: persistentvolumeclaim "training" not found'
        pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": message}]
    world.run(1)
    assert reported(world.status, "VolumesReady") == ("False", "PVCNotFound")
    world.run(1000)
    assert reported(world.status, "Failed") == ("True", "PendingDeadline")
    assert not world.jobs


# ------------------------------------------------------------------------------------------------------ pods that cannot


def test_an_image_that_cannot_be_pulled() -> None:
    world = World()
    world.run()
    waiting = {"reason": "ErrImagePull", "message": "manifest unknown"}
    world.worker(2)["status"]["containerStatuses"] = [{"name": "convert", "state": {"waiting": waiting}}]
    world.run(5)
    assert reported(world.status, "Degraded") == ("True", "ImagePullBackOff")
    assert reported(world.status, "Stalled") == ("True", "ImagePullBackOff")
    world.run(1000)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "PendingDeadline"))
    assert not world.jobs
    assert reported(world.status, "Degraded") == ("True", "ImagePullBackOff")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('pods "demo-1-0" is forbidden: exceeded quota: compute', "QuotaExceeded"),
        ('pods "demo-1-0" is forbidden: failed quota: q: must specify limits.memory', "QuotaExceeded"),
        ('pods "demo-1-0" is forbidden: violates PodSecurity "restricted:latest"', "PodRejected"),
    ],
)
def test_pods_that_the_api_server_refuses(message: str, reason: str) -> None:
    world = World()
    world.settle()
    world.warnings = {world.jobs["demo-1"]["metadata"]["uid"]: message}
    world.now = world.now.replace(minute=5)
    world.settle()
    assert reported(world.status, "Degraded") == ("True", reason)
    [said] = [c["message"] for c in world.status["conditions"] if c["type"] == "Degraded"]
    assert ("set spec.workers.resources" in said) == ("must specify" in message)


@pytest.mark.parametrize(("code", "kept"), [(0, 0.0), (75, 10.0)], ids=["the-next-stage", "another-try"])
def test_pods_that_are_refused_after_a_first_one_ran_are_not_waited_for_for_ever(code: int, kept: float) -> None:
    world = World(("spec.workers", {"maxParallelStages": 1}))
    world.run()
    world.start(0)
    world.run(40 * 3600)
    world.refuses_pods = 'pods "demo-1-1" is forbidden: exceeded quota: compute'
    world.end(0, code)
    world.run(1)
    assert (world.phase, reported(world.status, "Degraded")) == ("Running", ("True", "QuotaExceeded"))
    world.run(890 + kept)
    assert world.phase == "Running"
    world.run(20)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "PendingDeadline"))
    [failed] = [c for c in world.status["conditions"] if c["type"] == "Failed"]
    assert "QuotaExceeded: pods" in failed["message"]
    assert not world.jobs


def test_what_was_refused_once_does_not_end_a_pause_between_two_tries() -> None:
    """The warning of the first hour may still be there; the Job controller waits for ten minutes at most."""
    world = ready(("spec.pendingDeadlineSeconds", 60))
    for number in range(4):
        world.end(number, 75)
    world.control()
    for pod in world.alive:
        pod["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"] = "9"
        world.finish(pod, 75)
    world.warnings = {world.jobs["demo-1"]["metadata"]["uid"]: "exceeded quota: compute"}
    world.step()
    world.now = world.now.replace(minute=world.now.minute + 10)
    assert world.step().actions == ()
    assert world.phase == "Running"


@pytest.mark.parametrize("reason", ["QuotaExceeded", "JobRefused"])
def test_a_refused_job_is_asked_for_again_and_the_status_does_not_flap(reason: str) -> None:
    world = World()
    world.step(dies=True)
    world.refused(Refusal(reason=reason, message="no"))
    assert reported(world.status, "Ready") == ("False", reason)
    writes = len(world.written)
    decided = world.step(dies=True)
    assert [type(action) for action in decided.actions] == [CreateJob]
    assert len(world.written) == writes
    world.run(30)
    assert reported(world.status, "Ready") == ("False", "InProgress")


@pytest.mark.parametrize(
    ("reason", "stalled"), [("QuotaExceeded", "False"), ("JobRefused", "True"), ("JobNotCreated", "False")]
)
def test_a_refused_job_is_asked_for_until_the_pending_deadline(reason: str, stalled: str) -> None:
    world = World(("spec.pendingDeadlineSeconds", 60))
    to_error = Refusal(reason=reason, message="no")
    world.step(dies=True)
    assert world.refused(to_error).again == 30.0
    assert reported(world.status, "Degraded") == ("True", reason)
    assert reported(world.status, "Stalled") == (stalled, reason)
    assert world.status["pendingSince"] == "2026-01-02T03:04:05Z"
    check_status(world.status)
    world.now += timedelta(seconds=45)
    assert [type(action) for action in world.step(dies=True).actions] == [CreateJob]
    assert world.refused(to_error).again == 15.0
    assert world.phase == "Pending"
    world.now += timedelta(seconds=15)
    assert [type(action) for action in world.step(dies=True).actions] == [CreateJob], "once more before it is given up"
    world.refused(to_error)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "PendingDeadline"))
    assert reported(world.status, "Degraded") == ("True", reason)
    [said] = [c["message"] for c in world.status["conditions"] if c["type"] == "Failed"]
    assert said == f"no worker could start for 60 s; {reason}: no"
    assert "pendingSince" not in world.status
    check_status(world.status)
    world.retry("1")
    world.step()
    world.step(dies=True)
    world.refused(to_error)
    assert world.phase == "Pending", "a retry has its whole pending time"


def test_the_pending_time_of_a_refused_job_ends_when_there_is_one() -> None:
    world = World(("spec.pendingDeadlineSeconds", 60))
    world.step(dies=True)
    world.refused(Refusal(reason="QuotaExceeded", message="no"))
    world.run(59)
    assert "pendingSince" not in world.status
    world.start(0, 1, 2, 3)
    world.run(3600)
    world.delete_job("demo-1")
    world.reap()
    world.step(dies=True)
    world.refused(Refusal(reason="QuotaExceeded", message="no"))
    assert world.phase == "Running", "it begins anew"


def test_one_that_is_suspended_is_refused_as_long_as_its_user_likes() -> None:
    world = World(("spec.pendingDeadlineSeconds", 60), ("spec.suspend", True))
    for _ in range(3):
        world.step(dies=True)
        world.refused(Refusal(reason="QuotaExceeded", message="no"))
        world.now += timedelta(hours=1)
    assert world.phase == "Suspended"


@pytest.mark.parametrize("reason", ["NameConflict", "InvalidSpec"])
def test_a_job_that_can_never_be_made(reason: str) -> None:
    world = World()
    world.step(dies=True)
    world.refused(Refusal(reason=reason, message="no"))
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", reason))


def test_a_node_that_is_lost() -> None:
    world = ready()
    world.worker(1)["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    world.run(30)
    assert reported(world.status, "Degraded") == ("False", "AsExpected")
    why = "rank_3 has nothing yet"
    world.live = {pod["metadata"]["uid"]: Report(reason="WaitingForCheckpoint", message=why) for pod in world.alive}
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "WaitingForCheckpoint")
    world.run(90)
    assert reported(world.status, "Degraded") == ("True", "NodeLost")
    assert (reported(world.status, "Ready"), reported(world.status, "Stalled")) == (
        ("False", "NodeLost"),
        ("True", "NodeLost"),
    )
    assert world.phase == "Running"
    check_status(world.status)


def lost(world: World) -> None:
    """Its kubelet is gone: what is asked to stop does not, and nobody is called with it."""
    world.run(120)
    decided = world.run(120)
    assert reported(world.status, "Degraded") == ("True", "NodeLost")
    assert reasons(world).count("NodeLost") == 1
    assert decided.again is not None
    check_status(world.status)


def test_a_lost_node_is_reported_while_a_cancelled_conversion_waits_for_it() -> None:
    world = ready()
    world.edit(cancel=True)
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "Cancelling")
    lost(world)
    assert reported(world.status, "Ready") == ("False", "NodeLost")
    world.reap()
    world.run(1)
    assert (world.phase, reported(world.status, "Degraded")) == ("Cancelled", ("False", "Ended"))


def test_a_lost_node_is_reported_while_a_suspended_conversion_waits_for_it() -> None:
    world = ready()
    world.edit(suspend=True)
    world.run(1)
    lost(world)
    assert (world.phase, reported(world.status, "Ready")) == ("Suspended", ("False", "UserRequested"))
    world.reap()
    assert world.run(1).again is None
    assert reported(world.status, "Degraded") == ("False", "AsExpected")


def test_a_lost_node_is_reported_while_a_job_is_made_anew() -> None:
    world = ready()
    world.delete_job("demo-1")
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "WaitingForPods")
    lost(world)
    assert reported(world.status, "Ready") == ("False", "NodeLost")


def test_a_lost_node_is_reported_while_a_retry_waits_for_what_the_failed_attempt_left() -> None:
    world = World()
    world.run()
    for pod in world.alive:
        waiting = {"reason": "ErrImagePull", "message": "manifest unknown"}
        pod["status"]["containerStatuses"] = [{"name": "convert", "state": {"waiting": waiting}}]
    world.run(1000)
    assert (world.phase, len(world.alive)) == ("Failed", 4)
    world.retry("1")
    world.run(1)
    assert (world.phase, reported(world.status, "Ready")) == ("Pending", ("False", "WaitingForPods"))
    assert reasons(world)[-1] == "RetryRequested"
    lost(world)
    assert len(world.made) == 1, "one writer for each stage"
    world.reap()
    world.run(1)
    assert (world.status["attempt"], len(world.made), len(world.alive)) == (2, 2, 4)


def test_a_retry_waits_for_a_job_of_the_failed_attempt_that_is_still_there() -> None:
    world = ready()
    world.document["spec"]["parallelism"]["pipeline"] = 3
    world.step(dies=True)
    assert world.phase == "Failed"
    world.document["spec"]["parallelism"]["pipeline"] = 4
    world.retry("1")
    decided = world.step()
    assert [type(action) for action in decided.actions] == []
    decided = world.step()
    assert [type(action) for action in decided.actions] == [DeleteJob]
    assert reported(world.status, "Ready") == ("False", "WaitingForPods")
    world.reap()
    world.run(1)
    assert list(world.jobs) == ["demo-2"]


# -------------------------------------------------------------------------------------------------------- workers that fail


def test_a_failure_that_may_pass_is_tried_again() -> None:
    world = ready()
    world.end(3, 75, report=report(75, "no space"))
    world.run(2)
    assert reported(world.status, "Degraded") == ("True", "StageRetrying")
    assert stage(world, 3)["reason"] == "TryAgain"
    world.end(3)
    world.run(2)
    assert reported(world.status, "Degraded") == ("False", "AsExpected")
    assert stage(world, 3) == {
        "stage": 3, "state": "Succeeded", "attempts": 2, "node": "node-a", "iteration": 500, "verified": "Digest",
    }  # fmt: skip


def test_an_eviction_costs_no_attempt() -> None:
    world = ready(ONE_TRY)
    world.end(0, 143, disrupted="EvictionByEvictionAPI")
    world.run(2)
    assert reported(world.status, "Degraded") == ("True", "Evicted")
    assert stage(world, 0)["disruptions"] == 1
    assert world.worker(0)


def test_one_bad_stage_does_not_stop_the_others_and_is_retried_alone() -> None:
    world = ready()
    world.end(3, 65, report=report(65, "rank_3 is truncated"))
    world.run(1)
    assert world.phase == "Running"
    for number in range(3):
        world.end(number)
    world.run(9)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "StageFailed"))
    assert states(world) == ["Succeeded"] * 3 + ["Failed"]
    assert "rank_3 is truncated" in stage(world, 3)["message"]
    [failed] = [c for c in world.status["conditions"] if c["type"] == "Failed"]
    assert "ckpt2pt.dev/retry" in failed["message"]
    world.run(500)
    assert len(world.made) == 1
    world.retry("1")
    world.run(1)
    assert world.status["attempt"] == 2
    assert world.jobs["demo-2"]["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "3"}
    world.end(3)
    world.run(9)
    assert world.phase == "Succeeded"
    assert world.status["retryToken"] == "1"
    assert world.run(500).again is None


def test_a_digest_that_differs_is_reported_by_verified() -> None:
    world = ready()
    world.end(0, 76)
    for number in (1, 2, 3):
        world.end(number)
    world.run(9)
    assert reported(world.status, "Verified") == ("False", "DigestMismatch")


def test_arguments_that_are_wrong_for_all_end_everything_at_once() -> None:
    world = ready()
    world.end(1, 64, report=report(64, "--num-layers does not fit"))
    world.control()
    world.reap()
    world.run(9)
    [failed] = [c for c in world.status["conditions"] if c["type"] == "Failed"]
    assert (failed["reason"], failed["message"]) == ("InvalidSpec", "--num-layers does not fit")


def test_too_many_failed_stages() -> None:
    world = ready(("spec.retries", {"perStage": 0, "maxFailedStages": 0}))
    world.end(1, 74)
    world.control()
    world.reap()
    world.run(9)
    assert reported(world.status, "Failed") == ("True", "MaxFailedStages")


def test_the_deadline_of_the_whole() -> None:
    world = ready(("spec.activeDeadlineSeconds", 60))
    job = world.jobs["demo-1"]
    assert job["spec"]["activeDeadlineSeconds"] == 60
    world._end(job, "DeadlineExceeded")
    world.reap()
    world._end(job, "DeadlineExceeded")
    world.run(9)
    assert reported(world.status, "Failed") == ("True", "ActiveDeadline")


# ------------------------------------------------------------------------------------------------------------------ memory


def starve(world: World, *stages: int) -> None:
    for number in stages:
        world.end(number, 137, reason="OOMKilled")


def test_stages_that_need_more_memory_get_it_and_only_they() -> None:
    world = ready(MEMORY, ONE_TRY)
    starve(world, 1, 2)
    world.end(0)
    world.end(3, 65)
    world.run(9)
    job = world.jobs["demo-2"]
    assert job["metadata"]["annotations"] == {"ckpt2pt.dev/stages": "1,2"}
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == str(384 << 20)
    assert world.status["memoryPercent"] == 150
    assert "MemoryGrown" in reasons(world)
    world.end(1)
    world.end(2)
    world.run(9)
    assert states(world) == ["Succeeded", "Succeeded", "Succeeded", "Failed"]
    assert reported(world.status, "Failed") == ("True", "StageFailed")


def test_memory_grows_to_a_limit() -> None:
    world = World(MEMORY, ("spec.retries", {"perStage": 0, "maxMemory": "300Mi"}))
    for _ in range(4):
        world.run(9)
        if world.alive:
            starve(world, *(world.stage_of(pod) for pod in world.alive))
    world.run(9)
    assert world.phase == "Failed"
    assert len(world.made) == 2
    assert stage(world, 0)["reason"] == "OOMKilled"


def test_a_job_that_refused_its_arguments_gets_no_more_memory() -> None:
    world = ready(MEMORY, ONE_TRY)
    starve(world, 1)
    world.end(2, 64)
    world.control()
    world.reap()
    world.run(9)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "InvalidSpec"))


def test_the_end_is_not_reported_before_the_pods_have_said_why() -> None:
    world = ready(MEMORY, ONE_TRY)
    starve(world, 1)
    for number in (0, 2, 3):
        world.end(number)
    world.control()
    hidden = {name: pod for name, pod in world.pods.items() if pod["status"]["phase"] == "Failed"}
    for name in hidden:
        del world.pods[name]
    world.step()
    assert world.phase == "Running"
    world.pods |= hidden
    world.run(1)
    assert "demo-2" in world.jobs


# ----------------------------------------------------------------------------------------------------------------- training

AFTER = ("spec.startAfter", {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"})


@pytest.mark.parametrize(
    ("training", "phase", "reason"),
    [
        (None, "Pending", "TrainingKindUnknown"),
        (Training(state="Missing"), "Pending", "WaitingForTraining"),
        (Training(state="Running", uid="t"), "Pending", "WaitingForTraining"),
        (Training(state="Failed", uid="t"), "Failed", "TrainingFailed"),
    ],
)
def test_the_training_comes_first(training: Training | None, phase: str, reason: str) -> None:
    world = World(AFTER)
    world.training = training
    world.run()
    assert (world.phase, reported(world.status, "Ready")) == (phase, ("False", reason))
    assert not world.made
    check_status(world.status)


def test_a_training_of_a_kind_that_nobody_watches_is_reported_with_what_is_watched() -> None:
    volcano = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": "train-x"}
    world = World(("spec.startAfter", volcano))
    world.training = Training(state="Unwatched", message="batch/v1 Job, kubeflow.org/v1 PyTorchJob")
    world.run()
    assert reported(world.status, "Stalled") == ("True", "TrainingKindUnknown")
    assert reported(world.status, "Degraded") == ("True", "TrainingKindUnknown")
    [note] = notes({}, world.status)
    assert (note.kind, note.reason) == ("Warning", "TrainingKindUnknown")
    assert note.message == (
        "Job train-x is of batch.volcano.sh/v1alpha1 Job, which this operator does not watch; it watches batch/v1 Job, "
        "kubeflow.org/v1 PyTorchJob; name one of them, or add the kind to trainingKinds in the values of the chart"
    )
    check_status(world.status)


def test_a_training_that_vanishes_is_no_success() -> None:
    world = World(AFTER)
    world.training = Training(state="Running", uid="t")
    world.run()
    world.training = Training(state="Missing")
    world.run(1)
    assert reported(world.status, "Failed") == ("True", "TrainingDeleted")


def test_it_begins_when_the_training_has_succeeded() -> None:
    world = World(AFTER)
    world.training = Training(state="Running", uid="t")
    world.run()
    world.training = Training(state="Succeeded", uid="t")
    world.run(1)
    assert len(world.made) == 1
    world.training = Training(state="Missing")
    world.run(1)
    assert world.phase == "Pending"


def test_a_retry_after_a_failed_training_waits_for_the_training_again() -> None:
    world = World(AFTER)
    world.training = Training(state="Failed", uid="t")
    world.run()
    world.training = Training(state="Missing")
    world.retry("1")
    world.run(1)
    assert reported(world.status, "Ready") == ("False", "WaitingForTraining")
    assert not world.made


# ----------------------------------------------------------------------------------------------------- documents, servers


def test_a_document_that_describes_no_conversion() -> None:
    world = World(("spec.parallelism.pipeline", 3))
    world.run()
    assert (world.phase, reported(world.status, "Accepted")) == ("Failed", ("False", "InvalidSpec"))
    check_status(world.status)
    writes = len(world.written)
    world.run(500)
    assert len(world.written) == writes


def test_a_document_that_is_refused_while_it_runs_stops_and_keeps_its_results() -> None:
    world = ready()
    world.end(0)
    world.run(1)
    world.document["spec"]["parallelism"]["pipeline"] = 3
    world.run(1)
    assert (world.phase, reported(world.status, "Failed")) == ("Failed", ("True", "InvalidSpec"))
    assert not world.jobs
    assert stage(world, 0)["state"] == "Succeeded"
    check_status(world.status)


def test_a_server_that_does_not_know_retries_of_an_index() -> None:
    world = ready()
    spec = world.jobs["demo-1"]["spec"]
    del spec["backoffLimitPerIndex"]
    spec["backoffLimit"] = 6  # for all stages together, as the API server has it by default
    decided = world.step()
    assert [action.spec for action in decided.actions if isinstance(action, PatchJob)] == [{"backoffLimit": 12}]
    assert reported(world.status, "Degraded") == ("True", "PerIndexRetryUnsupported")
    assert not world.step().actions


def test_only_a_new_token_on_a_failed_conversion_is_a_retry() -> None:
    world = World(("spec.parallelism.pipeline", 4))
    world.retry("old")
    world.run()
    assert world.status["retryToken"] == "old"
    for number in range(4):
        world.end(number, 65)
    world.run(9)
    world.run(500)
    assert (world.phase, len(world.made)) == ("Failed", 1)
    world.retry("new")
    world.run(1)
    assert len(world.made) == 2


def test_a_token_that_comes_before_the_failure_has_no_effect_then_or_later() -> None:
    world = ready(ONE_TRY)
    world.retry("early")
    world.run(1)
    assert world.status["retryToken"] == "early"
    assert reasons(world)[-1] == "RetryIgnored"
    for number in range(4):
        world.end(number, 65)
    world.run(9)
    world.run(500)
    assert (world.phase, len(world.made)) == ("Failed", 1)
    del world.document["metadata"]["annotations"]["ckpt2pt.dev/retry"]
    world.run(1)
    world.retry("early")
    world.run(1)
    assert (world.phase, len(world.made)) == ("Failed", 1)
    world.retry("now")
    world.run(1)
    assert len(world.made) == 2
    assert reasons(world)[-2:] == ["RetryRequested", "JobCreated"]
    assert reasons(world).count("RetryIgnored") == 1


# ------------------------------------------------------------------------------------------------------------ abuse and size


@pytest.mark.parametrize("phase", ["Succeeded", "Failed", "Cancelled"])
def test_an_edit_after_the_end_is_observed_in_every_place(phase: str) -> None:
    world = ready(ONE_TRY)
    for number in range(4):
        world.end(number, {"Succeeded": 0, "Failed": 65, "Cancelled": 75}[phase])
    if phase == "Cancelled":
        world.edit(cancel=True)
    world.run(1)
    world.run(9)
    assert world.phase == phase
    for pipeline in (4, 3):  # what this operator refuses, another may have carried out
        world.document["spec"]["parallelism"]["pipeline"] = pipeline
        world.edit(ttlSecondsAfterFinished=60)
        world.run(1)
        generation = world.document["metadata"]["generation"]
        seen = {c["observedGeneration"] for c in world.status["conditions"]} | {world.status["observedGeneration"]}
        assert (world.phase, seen) == (phase, {generation})


def test_the_status_of_one_that_nobody_has_looked_at_yet_is_no_status() -> None:
    """An API server fills it in, so that whoever waits for the object waits for an operator."""
    world = World()
    world.document["status"] = {"observedGeneration": -1}
    world.retry("before-it-began")
    assert kstatus(world.status, 1) == "InProgress"
    world.run()
    assert (world.phase, world.status["observedGeneration"]) == ("Pending", 1)
    assert "RetryIgnored" not in [note.reason for note in notes({"observedGeneration": -1}, world.written[0])]


def test_a_thousand_failing_stages_fit_into_a_status() -> None:
    world = World(("spec.model.numLayers", 1024), ("spec.parallelism.pipeline", 1024), ONE_TRY)
    world.run()
    for number, pod in enumerate(world.alive):
        world.finish(pod, 65, report=report(65, f"{number} " + "é \u4e2d\U0001f600" * 900))
    world.run(9)
    assert world.phase == "Failed"
    assert len(json.dumps(world.status, ensure_ascii=False).encode()) < 1_200_000
    check_status(world.status)
    assert len(reasons(world)) < 32
    world.pods.clear()
    writes = len(world.written)
    world.settle()
    assert len(world.written) == writes


@pytest.mark.parametrize(
    "left",
    [
        json.dumps({"version": 1, "bytes": (1 << 63) - 1, "bytesTotal": (1 << 63) - 1, "throughput": 1e300}),
        json.dumps({"version": 1, "exitCode": 75, "reason": "not a word\n", "message": "\x00\x1b[31m\ud800"}),
        json.dumps({"version": 1, "reason": "X" * 5000, "message": "m" * 5000}),
        json.dumps({"version": 1, "iteration": 10**30, "message": ["list"], "exitCode": "64"}),
        "[" * 5000,
        "\x00" * 4096,
    ],
)
def test_what_a_worker_says_cannot_make_a_status_that_is_refused(left: str) -> None:
    world = ready()
    for number in range(4):
        world.end(number, 75 if number % 2 else 65, report=left)
    world.run(9)
    check_status(world.status)
    for pod in world.alive:
        pod["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"] = str(1 << 62)
        pod["status"]["reason"] = "odd reason"
    world.start(1, 3)
    world.step()
    check_status(world.status)
