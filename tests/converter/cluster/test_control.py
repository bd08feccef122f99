"""Retry, cancel, and the log of the right pod."""

from __future__ import annotations

import re
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt.cluster.api import Api, Connection
from ckpt2pt.cluster.control import cancel, log_of_stage, newest_pod, retry
from ckpt2pt.cluster.submit import Submitted
from ckpt2pt.errors import MissingInputError

THERE = Submitted(namespace="ml", name="demo", created=False)


def api_of(server: Server) -> Api:
    return Api(Connection(server=server.url, context=None, token=lambda: None, namespace="ml", direct=True), seconds=5)


def test_retry_and_cancel_change_one_field_each() -> None:
    server = Server(lambda *_: (200, {}))
    with server.running():
        retry(api_of(server), THERE)
        retry(api_of(server), THERE)
        cancel(api_of(server), THERE)
    tokens = [asked[2]["metadata"]["annotations"]["ckpt2pt.dev/retry"] for asked in server.asked[:2]]
    assert len(set(tokens)) == 2
    assert server.asked[2][2] == {"spec": {"cancel": True}}


def test_one_that_is_not_there() -> None:
    server = Server(lambda *_: (404, {"message": "not found"}))
    with server.running(), pytest.raises(MissingInputError):
        retry(api_of(server), THERE)


def job(attempt: int, stages: str = "") -> dict[str, Any]:
    annotations = {"ckpt2pt.dev/stages": stages} if stages else {}
    return {"metadata": {"labels": {"ckpt2pt.dev/attempt": str(attempt)}, "annotations": annotations}}


def pod(name: str, attempt: int, index: int, when: str) -> dict[str, Any]:
    labels = {"ckpt2pt.dev/attempt": str(attempt), "batch.kubernetes.io/job-completion-index": str(index)}
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": f"2026-01-01T00:00:{when}Z"}}


JOBS = [job(1), job(2, "1,3")]
PODS = [pod("a", 1, 3, "01"), pod("b", 1, 3, "05"), pod("c", 2, 1, "09"), pod("d", 2, 0, "08"), pod("e", 1, 0, "01")]


@pytest.mark.parametrize(("stage", "name"), [(3, "c"), (1, "d"), (0, "e"), (2, None)])
def test_the_newest_pod_of_a_stage(stage: int, name: str | None) -> None:
    assert newest_pod(JOBS, PODS, stage) == name


def test_the_log_of_a_stage() -> None:
    def answer(_: str, path: str, body: object) -> Answer:
        if path.startswith("/apis/batch"):
            return 200, {"items": JOBS}
        return (
            (200, "line 1\nline 2\n") if re.search(r"/pods/c/log\?container=convert$", path) else (200, {"items": PODS})
        )

    server = Server(answer)
    with server.running():
        assert log_of_stage(api_of(server), THERE, 3) == "line 1\nline 2\n"
        with pytest.raises(MissingInputError, match="no pod"):
            log_of_stage(api_of(server), THERE, 2)
    assert (
        "labelSelector=app.kubernetes.io%2Fname%3Dckpt2pt%2Capp.kubernetes.io%2Finstance%3Ddemo" in server.asked[0][1]
    )
