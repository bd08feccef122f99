"""Retry, cancel, and the log of the right pod."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.kube.cluster.api import Api, Connection
from ckpt2pt.kube.cluster.control import cancel, log_of_stage, newest_pod, retry
from ckpt2pt.kube.cluster.submit import Submitted

THERE = Submitted(namespace="ml", name="demo", created=False)


def api_of(server: Server) -> Api:
    return Api(Connection(server=server.url, context=None, token=lambda: None, namespace="ml", direct=True), seconds=5)


def in_phase(phase: str) -> Server:
    return Server(lambda *_: (200, {"status": {"phase": phase}} if phase else {}))


def test_a_retry_is_another_one_each_time() -> None:
    server = in_phase("Failed")
    with server.running():
        retry(api_of(server), THERE)
        retry(api_of(server), THERE)
    patches = [body for method, _, body, _ in server.asked if method == "PATCH"]
    assert len({body["metadata"]["annotations"]["ckpt2pt.dev/retry"] for body in patches}) == 2


@pytest.mark.parametrize("phase", ["", "Running", "Suspended"])
def test_a_cancel_changes_one_field(phase: str) -> None:
    server = in_phase(phase)
    with server.running():
        cancel(api_of(server), THERE)
    assert server.asked[-1][2] == {"spec": {"cancel": True}}


@pytest.mark.parametrize(
    ("do", "phase", "words"),
    [
        (retry, "Running", "it is Running, and only what has Failed is tried again"),
        (retry, "", "it is Pending, and"),
        (retry, "Succeeded", "make a new CheckpointConversion"),
        (cancel, "Succeeded", "it is Succeeded already"),
        (cancel, "Cancelled", "it is Cancelled already"),
    ],
)
def test_what_would_have_no_effect_is_refused(do: Callable[[Api, Submitted], None], phase: str, words: str) -> None:
    server = in_phase(phase)
    with server.running(), pytest.raises(UsageError, match=words):
        do(api_of(server), THERE)
    assert [method for method, *_ in server.asked] == ["GET"]


@pytest.mark.parametrize(("spec", "name"), [({"follow": {}}, "a"), ({"dryRun": True}, "a"), ({"dryRun": False}, None)])
def test_one_worker_that_does_all_stages_has_the_log_of_each(spec: dict[str, Any], name: str | None) -> None:
    def answer(_: str, path: str, __: object) -> Answer:
        if path.endswith("/log?container=convert"):
            return 200, path
        items = {"jobs": [job(1)], "pods": [pod("a", 1, 0, "01")]}
        kind = path.partition("?")[0].rpartition("/")[2]
        return 200, {"items": items[kind]} if kind in items else {
            "metadata": {"uid": UID},
            "spec": {"parallelism": {"pipeline": 4}, **spec},
        }

    server = Server(answer)
    with server.running(), nullcontext() if name else pytest.raises(MissingInputError):
        assert f"/pods/{name}/log" in log_of_stage(api_of(server), THERE, 3)


@pytest.mark.parametrize("name", ["", "..", "../../other/checkpointconversions/a", "a/status", "a%2Fstatus"])
def test_a_name_that_could_become_another_path_is_refused_before_anything_is_asked(name: str) -> None:
    server = in_phase("Failed")
    with server.running():
        for there in (replace(THERE, name=name), replace(THERE, namespace=name or "..")):
            with pytest.raises(UsageError, match="is not the name of an object"):
                retry(api_of(server), there)
    assert server.asked == []


def test_one_that_is_not_there() -> None:
    server = Server(lambda *_: (404, {"message": "not found"}))
    with server.running(), pytest.raises(MissingInputError):
        retry(api_of(server), THERE)


UID = "uid-of-demo"


def owned(uid: str) -> list[dict[str, Any]]:
    return [{"uid": "of-somebody"}, {"uid": uid, "controller": True}]


def job(attempt: int, stages: str = "", owner: str = UID) -> dict[str, Any]:
    annotations = {"ckpt2pt.dev/stages": stages} if stages else {}
    return {"metadata": {"uid": f"j{attempt}", "ownerReferences": owned(owner), "annotations": annotations}}


def pod(name: str, attempt: int, index: int, when: str, job: str = "") -> dict[str, Any]:
    labels = {"ckpt2pt.dev/attempt": str(attempt), "batch.kubernetes.io/job-completion-index": str(index)}
    meta = {"name": name, "labels": labels, "creationTimestamp": f"2026-01-01T00:00:{when}Z"}
    return {"metadata": {**meta, "ownerReferences": owned(job or f"j{attempt}")}}


JOBS = [job(1), job(2, "1,3"), job(9, owner="of-another")]
PODS = [
    pod("a", 1, 3, "01"), pod("b", 1, 3, "05"), pod("c", 2, 1, "09"), pod("d", 2, 0, "08"), pod("e", 1, 0, "01"),
    pod("forged", 1, 3, "59", job="j9"), pod("forged", 1, 0, "59", job="nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "name"), [(3, "c"), (1, "d"), (0, "e"), (2, None)])
def test_the_newest_pod_of_a_stage(stage: int, name: str | None) -> None:
    assert newest_pod(UID, JOBS, PODS, stage) == name


@pytest.mark.parametrize(
    ("spec", "stage", "known"),
    [
        ({"parallelism": {"pipeline": 2}}, 7, "stages 0 to 1"),
        ({}, 1, "stage 0 alone"),
        ({"dryRun": True}, 1, "stage 0"),
    ],
)
def test_a_stage_that_it_does_not_have_is_not_waited_for(spec: dict[str, Any], stage: int, known: str) -> None:
    server = Server(lambda *_: (200, {"spec": spec}))
    with server.running(), pytest.raises(UsageError, match=f"there is no stage {stage}") as caught:
        log_of_stage(api_of(server), THERE, stage)
    assert known in caught.value.hint
    assert len(server.asked) == 1


def test_the_log_of_a_stage() -> None:
    def answer(_: str, path: str, body: object) -> Answer:
        if path.startswith("/apis/batch"):
            return 200, {"items": JOBS}
        if path.endswith("/demo"):
            return 200, {"metadata": {"uid": UID}, "spec": {"parallelism": {"pipeline": 4}}}
        return (
            (200, "line 1\nline 2\n") if re.search(r"/pods/c/log\?container=convert$", path) else (200, {"items": PODS})
        )

    server = Server(answer)
    with server.running():
        assert log_of_stage(api_of(server), THERE, 3) == "line 1\nline 2\n"
        with pytest.raises(MissingInputError, match="no pod"):
            log_of_stage(api_of(server), THERE, 2)
    assert (
        "labelSelector=app.kubernetes.io%2Fname%3Dckpt2pt%2Capp.kubernetes.io%2Finstance%3Ddemo" in server.asked[1][1]
    )
