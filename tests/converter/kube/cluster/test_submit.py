"""Exactly once; and the exit code of a conversion is that of its worst stage."""

from __future__ import annotations

from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt.errors import MissingInputError, TryAgainError, UsageError
from ckpt2pt.kube.cluster import submit as module
from ckpt2pt.kube.cluster.api import Api, Connection
from ckpt2pt.kube.cluster.submit import Submitted, code_of, follow, sentence, submit
from ckpt2pt.kube.conversion.status import REASONS
from documents import changed, minimal

THERE = Submitted(namespace="ml", name="demo", created=True)
PATH = "/apis/ckpt2pt.dev/v1alpha1/namespaces/ml/checkpointconversions"


def api_of(server: Server) -> Api:
    return Api(Connection(server=server.url, context=None, token=lambda: None, namespace="ml", direct=True), seconds=5)


def test_it_is_created_in_the_documents_namespace_or_that_of_the_connection() -> None:
    server = Server(lambda *_: (201, {}))
    with server.running():
        assert submit(api_of(server), minimal()) == THERE
        submit(api_of(server), changed(("metadata.namespace", "own")))
    assert server.asked[0][:3] == ("POST", f"{PATH}?fieldValidation=Strict", minimal())
    assert "/namespaces/own/" in server.asked[1][1]


@pytest.mark.parametrize(
    ("found", "same"),
    [
        pytest.param(
            (200, changed(("spec.verify", "Digest"), ("spec.suspend", True))), True, id="the-same-with-defaults"
        ),
        pytest.param((200, changed(("spec.mode", "ParamsOnly"))), True, id="a-field-we-left-to-its-default"),
        pytest.param((200, changed(("spec.target.path", "else"))), False, id="another"),
        pytest.param((200, changed(("spec.model.noopLayers", [1]))), True, id="a-list-we-did-not-ask-for"),
        pytest.param((403, {"message": "no"}), True, id="may-not-look"),
    ],
)
def test_one_that_is_there_is_as_good_if_it_asks_for_the_same(found: Answer, same: bool) -> None:
    server = Server(lambda method, *_: (409, {"message": "exists"}) if method == "POST" else found)
    with server.running():
        if same:
            assert submit(api_of(server), minimal()).created is False
        else:
            with pytest.raises(UsageError, match="already exists with a different spec"):
                submit(api_of(server), minimal())


def test_lists_are_compared_item_by_item() -> None:
    ours = changed(("spec.model.noopLayers", [1, 2]))
    for theirs, same in (([1, 2], True), ([1], False), ([2, 1], False), (5, False)):
        answer = (200, changed(("spec.model.noopLayers", theirs)))
        server = Server(lambda method, *_, answer=answer: (409, {}) if method == "POST" else answer)
        with server.running():
            if same:
                submit(api_of(server), ours)
            else:
                with pytest.raises(UsageError):
                    submit(api_of(server), ours)


def test_a_refusal_says_why() -> None:
    server = Server(lambda *_: (422, {"message": "spec.model.numLayers: make it a multiple"}))
    with server.running(), pytest.raises(UsageError, match="make it a multiple"):
        submit(api_of(server), minimal())


# -------------------------------------------------------------------------------------------------------------- follow


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    return []


def followed(statuses: list[Any], **more: Any) -> tuple[list[Any], Any]:
    left, reported = list(statuses), list[Any]()

    def answer(*_: object) -> Answer:
        status = left.pop(0) if len(left) > 1 else left[0]
        return (404, {"message": "not found"}) if status == "gone" else (200, {"status": status})

    server = Server(answer)
    with server.running():
        return reported, follow(api_of(server), THERE, reported.append, **more)


def test_every_change_is_reported_once(statuses: list[Any]) -> None:
    statuses += [{}, {}, {"phase": "Running"}, {"phase": "Running"}, {"phase": "Succeeded"}]
    reported, seen = followed(statuses)
    assert reported == [{}, {"phase": "Running"}, {"phase": "Succeeded"}]
    assert seen["status"]["phase"] == "Succeeded"


def test_one_that_is_deleted_ends_the_wait(statuses: list[Any]) -> None:
    with pytest.raises(MissingInputError, match="deleted before it had ended"):
        followed([{"phase": "Running"}, "gone"])


@pytest.mark.parametrize("created", [True, False])
def test_one_that_was_never_seen_is_not_said_to_be_deleted(created: bool) -> None:
    server = Server(lambda *_: (404, {"message": "not found"}))
    there = Submitted(namespace="ml", name="nosuch", created=created)
    with server.running(), pytest.raises(MissingInputError) as caught:
        follow(api_of(server), there, print)
    assert ("deleted" in caught.value.what) == created
    assert created or caught.value.what == "reading it was refused (404): not found"


def test_patience_may_end(statuses: list[Any]) -> None:
    with pytest.raises(TryAgainError, match=r"not ended within 0\.05 s"):
        followed([{"phase": "Running"}], seconds=0.05)


def failed(*reasons: str) -> dict[str, Any]:
    stages = [{"stage": number, "state": "Failed", "reason": reason} for number, reason in enumerate(reasons)]
    return {"phase": "Failed", "stageStatuses": [*stages, {"stage": 9, "state": "Succeeded", "reason": "InputWrong"}]}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"phase": "Succeeded"}, 0),
        ({"phase": "Planned"}, 0),
        *((failed(reason), code) for code, reason in REASONS.items()),
        (failed("TryAgain", "InputWrong", "Bug"), 65),
        (failed("OOMKilled"), 75),
        ({"phase": "Cancelled"}, 75),
        ({"phase": "Failed", "conditions": [{"type": "Failed", "reason": "InvalidSpec"}]}, 64),
        ({"phase": "Failed", "conditions": [{"type": "Failed", "reason": "TrainingFailed"}]}, 66),
        ({"phase": "Failed", "conditions": [{"type": "Failed", "reason": "TargetConflict"}]}, 64),
        (failed("NoReport"), 70),
        ({"phase": "Failed", "conditions": [{"type": "Failed", "reason": "PendingDeadline"}]}, 75),
    ],
)
def test_the_code_of_a_conversion(status: dict[str, Any], code: int) -> None:
    assert code_of(status) == code


def test_a_status_in_a_line() -> None:
    ready = {"type": "Ready", "message": "1 of 4 stages are done"}
    status = {"phase": "Running", "progress": "37%", "stageSummary": "1/4", "conditions": [ready]}
    assert sentence(status) == "Running: 37%, 1/4 stages; 1 of 4 stages are done"
    assert sentence({}) == "Pending: not begun"
