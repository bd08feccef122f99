"""The proof of rights at the start."""

from __future__ import annotations

from typing import Any

from apiserver import Answer
from ckpt2pt_operator.access import CLAIMS, NEEDED, missing
from talking import talk

EACH = sum(len(verbs) for *_, verbs in NEEDED)


def test_all_rights_are_asked_for_in_each_namespace() -> None:
    found, asked = talk(
        lambda *_: (201, {"status": {"allowed": True}}), lambda api: missing(api, ("a", "b"), check_volumes=True)
    )
    assert found == []
    assert len(asked) == 2 * (EACH + sum(len(verbs) for *_, verbs in CLAIMS))
    assert {body["spec"]["resourceAttributes"]["namespace"] for _, _, body, _ in asked} == {"a", "b"}


def test_what_is_missing_is_told_as_an_administrator_would_grant_it() -> None:
    def answer(_: str, __: str, body: Any) -> Answer:
        wanted = body["spec"]["resourceAttributes"]
        refused = wanted["verb"] in {"patch", "update"} and wanted["resource"] != "events"
        return 201, {"status": {"allowed": not refused}}

    found, _ = talk(answer, lambda api: missing(api, (), check_volumes=False))
    assert found == [
        "update checkpointconversions.ckpt2pt.dev/status in all namespaces",
        "patch jobs.batch in all namespaces",
    ]


def test_an_answer_that_does_not_say_yes_is_a_no() -> None:
    found, _ = talk(
        lambda *_: (201, {"status": {"allowed": "true"}}), lambda api: missing(api, (), check_volumes=False)
    )
    assert len(found) == EACH
