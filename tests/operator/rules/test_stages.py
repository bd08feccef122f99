"""What a Job and its pods say of each stage, and what stands in their way."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from ckpt2pt.kube.conversion.report import Report
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.status import StageRecord
from ckpt2pt_operator.rules.stages import Blocker, cause, observed, pod_obstacle, recorded, setback, stuck_since
from ckpt2pt_operator.rules.views import Pod, job_view, pod_view
from simulation import START, World


def a_pod(**more: object) -> Pod:
    world = World()
    world.run()
    return replace(pod_view(world.worker(0)), **more)  # type: ignore[arg-type]


def test_records_are_those_of_the_status_and_what_is_odd_is_pending() -> None:
    status: Json = {"stageStatuses": [{"stage": 1, "state": "Succeeded", "bytes": 3}, {"stage": 9, "state": "Failed"}, {"stage": 0, "state": "Odd"}]}  # fmt: skip
    assert recorded(status, 2) == {0: StageRecord(stage=0), 1: StageRecord(stage=1, state="Succeeded", done=3)}


@pytest.mark.parametrize(
    ("pod", "report", "reason", "says"),
    [
        ({"phase": "Succeeded"}, Report(exit_code=0), "", ""),
        ({"phase": "Succeeded"}, None, "NoReport", "without a report"),
        ({"phase": "Failed", "exit_code": 137, "ending": "OOMKilled"}, None, "OOMKilled", "limits.memory"),
        (
            {"phase": "Failed", "exit_code": 143, "disruption": "Taint", "message": ""},
            None,
            "Evicted",
            "costs no attempt",
        ),
        (
            {"phase": "Failed", "exit_code": 65},
            Report(exit_code=65, reason="InputWrong", message="m"),
            "InputWrong",
            "m",
        ),
        ({"phase": "Failed", "exit_code": 74}, Report(exit_code=74, message="m"), "InputOutputError", "m"),
        ({"phase": "Failed", "reason": "DeadlineExceeded", "message": "late"}, None, "DeadlineExceeded", "late"),
        ({"phase": "Failed", "exit_code": None}, None, "PodDeleted", "deleted"),
        ({"phase": "Failed", "exit_code": 70, "report": "Traceback\nKeyError: 'x'"}, None, "Bug", "KeyError: 'x'"),
        ({"phase": "Failed", "exit_code": 137}, None, "Killed", "no message"),
        ({"phase": "Failed", "exit_code": 3}, None, "Failed", "exit code 3"),
    ],
)
def test_cause(pod: dict[str, object], report: Report | None, reason: str, says: str) -> None:
    found = cause(a_pod(**pod), report)
    assert found[0] == reason
    assert says in found[1]


def test_what_is_recorded_stays_when_its_pods_are_gone() -> None:
    world = World()
    world.run()
    job = job_view(world.jobs["demo-1"])
    before = {0: StageRecord(stage=0, reason="TryAgain", message="m", attempts=2, done=5, total=9, node="n")}
    found = observed(parse(world.document), before, job, (), {})[0]
    assert found == before[0]


def test_live_reports_are_those_of_the_pod_that_runs() -> None:
    world = World()
    world.run()
    world.start(0)
    pods = [pod_view(pod) for pod in world.pods.values()]
    running = next(pod for pod in pods if pod.running)
    live = {running.uid: Report(done=3, total=4, throughput=2), "other": Report(done=9)}
    found = observed(parse(world.document), recorded({}, 4), job_view(world.jobs["demo-1"]), pods, live)
    assert (found[0].state, found[0].done, found[0].total, found[0].throughput) == ("Running", 3, 4, 2)
    assert found[1] == StageRecord(stage=1, node="node-a")


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({"waiting": ("ImagePullBackOff", "")}, "ImagePullBackOff"),
        ({"waiting": ("InvalidImageName", "")}, "ImagePullBackOff"),
        ({"waiting": ("CreateContainerConfigError", "")}, "CreateContainerError"),
        ({"unscheduled": "0/3 nodes"}, "Unschedulable"),
        ({"node": "", "created": START - timedelta(seconds=31)}, "Unschedulable"),
        ({"node": "", "created": START - timedelta(seconds=20)}, None),
        ({"deleted": START - timedelta(seconds=91)}, "NodeLost"),
        ({"deleted": START - timedelta(seconds=60)}, None),
        ({"deleted": START - timedelta(seconds=91), "waiting": ("ErrImagePull", "")}, "NodeLost"),
        ({"deleted": START - timedelta(seconds=60), "waiting": ("ErrImagePull", "")}, None),
        ({"waiting": ("ContainerCreating", "")}, None),
        ({"waiting": ("ImagePullBackOff", ""), "phase": "Failed"}, None),
    ],
)
def test_obstacles(pod: dict[str, object], reason: str | None) -> None:
    found = pod_obstacle([a_pod(**pod)], {}, START)
    assert (found.reason if found else None) == reason


def test_the_worst_obstacle_is_reported() -> None:
    pods = [a_pod(unscheduled="0/3 nodes"), a_pod(waiting=("ErrImagePull", "no")), a_pod()]
    found = pod_obstacle(pods, {}, START)
    assert found
    assert found.reason == "ImagePullBackOff"


def test_a_mount_that_fails() -> None:
    pod = a_pod()
    found = pod_obstacle([pod], {pod.uid: "mount refused"}, START)
    assert found
    assert (found.reason, "mount refused" in found.message) == ("VolumeMountFailed", True)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([StageRecord(stage=0, reason="TryAgain", attempts=1)], "StageRetrying"),
        ([StageRecord(stage=0, reason="TryAgain", attempts=1), StageRecord(stage=1, reason="OOMKilled", attempts=1)], "OOMKilled"),
        ([StageRecord(stage=0, reason="Evicted", disruptions=1)], "Evicted"),
        ([StageRecord(stage=0, reason="InputWrong", attempts=1)], None),
        ([StageRecord(stage=0, state="Failed", reason="TryAgain", attempts=1)], None),
        ([StageRecord(stage=0, state="Running", attempts=1)], None),
    ],
)  # fmt: skip
def test_setbacks(records: list[StageRecord], reason: str | None) -> None:
    found = setback(parse(World().document), records)
    assert (found.reason if found else None) == reason


def later(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


FAILED = {"phase": "Failed", "started": START, "finished": later(50)}


@pytest.mark.parametrize(
    ("pods", "refused", "since"),
    [
        ([], False, 0),
        ([{}], False, 0),
        ([{"phase": "Running", "started": START}, {}], False, None),
        ([FAILED], False, None),
        ([FAILED], True, 60),
        ([{**FAILED, "failures": 2}], True, 90),
        ([{**FAILED, "failures": 1, "disruptions": 1}], True, 90),
        ([{**FAILED, "failures": 1 << 30}], True, 650),
        ([FAILED, {**FAILED, "phase": "Succeeded", "finished": later(70)}], True, 70),
        ([FAILED, {}], False, 60),
        ([{"phase": "Failed", "created": later(30)}], True, 40),
        ([{"phase": "Failed", "created": START, "deleted": later(30)}], True, 40),
    ],
)
def test_since_when_no_worker_could_start(pods: list[dict[str, object]], refused: bool, since: int | None) -> None:
    """A Job waits 10 s before it tries an index again, and twice as long each time, ten minutes at most."""
    world = World()
    world.run()
    found = stuck_since(
        job_view(world.jobs["demo-1"]),
        [a_pod(**pod) for pod in pods],
        Blocker(reason="QuotaExceeded", message="") if refused else None,
    )
    assert found == (None if since is None else later(since))
