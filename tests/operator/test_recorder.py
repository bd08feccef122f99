"""Events: one for each turn, counted when it comes again, never in the way."""

from __future__ import annotations

from typing import Any

import pytest

from apiserver import Answer
from ckpt2pt_operator import recorder as module
from ckpt2pt_operator.api import Api
from ckpt2pt_operator.recorder import Recorder
from ckpt2pt_operator.rules.notes import Note
from talking import talk

ABOUT: dict[str, Any] = {
    "apiVersion": "ckpt2pt.dev/v1alpha1",
    "kind": "CheckpointConversion",
    "metadata": {"namespace": "team", "name": "demo", "uid": "u"},
}
NOTE = Note(kind="Warning", reason="StageFailed", message="stage 1: no")


def written(*notes: Note, answer: Answer = (201, {"metadata": {"name": "demo.1"}})) -> list[tuple[str, str, Any, str]]:
    async def use(api: Api) -> None:
        recorder = Recorder(api)
        for note in notes:
            await recorder.write(ABOUT, note)

    return talk(lambda *_: answer, use)[1]


def test_an_event_is_about_the_conversion() -> None:
    [(method, path, body, _)] = written(NOTE)
    assert (method, path) == ("POST", "/api/v1/namespaces/team/events")
    assert body["involvedObject"] == {
        "apiVersion": "ckpt2pt.dev/v1alpha1", "kind": "CheckpointConversion", "namespace": "team", "name": "demo", "uid": "u",
    }  # fmt: skip
    assert (body["type"], body["reason"], body["message"], body["count"]) == (
        "Warning",
        "StageFailed",
        "stage 1: no",
        1,
    )
    assert body["source"]["component"] == "ckpt2pt-operator"
    assert body["firstTimestamp"] == body["lastTimestamp"]


def test_the_same_again_is_counted() -> None:
    asked = written(NOTE, NOTE, NOTE)
    assert [one[0] for one in asked] == ["POST", "PATCH", "PATCH"]
    assert asked[1][1] == "/api/v1/namespaces/team/events/demo.1"
    assert [one[2]["count"] for one in asked] == [1, 2, 3]


def test_another_message_is_another_event() -> None:
    assert [one[0] for one in written(NOTE, Note(kind="Warning", reason="StageFailed", message="stage 2: no"))] == [
        "POST"
    ] * 2


def test_after_a_while_it_is_a_new_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WINDOW", 0.0)
    assert [one[0] for one in written(NOTE, NOTE)] == ["POST", "POST"]


def test_a_fixed_number_of_events_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    first, second, third = (Note(kind="Normal", reason="Any", message=message) for message in "abc")
    assert [one[0] for one in written(first, second, third, third, second, first)] == [
        "POST", "POST", "POST", "PATCH", "PATCH", "POST",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [403, 404, 500])
def test_an_event_that_cannot_be_written_is_no_obstacle(code: int) -> None:
    assert [one[0] for one in written(NOTE, NOTE, answer=(code, {}))] == ["POST", "POST"]
