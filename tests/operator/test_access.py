"""The proof of rights at the start."""

from __future__ import annotations

from typing import Any

from apiserver import Answer
from ckpt2pt_operator.access import CLAIMS, NEEDED, missing, missing_of_lease
from ckpt2pt_operator.rules.trainings import kinds
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


def told(body: Any) -> str:
    found = body["spec"]["resourceAttributes"]
    return " ".join(filter(None, (found["verb"], found["resource"], found.get("group"), found.get("name"))))


def test_what_trainings_need_is_asked_for_where_they_are_watched() -> None:
    signs = {"succeeded": {"conditions": ["Complete"]}, "failed": {"conditions": ["Failed"]}}
    rows = kinds(
        [
            {"apiVersion": "batch/v1", "kind": "Job", "plural": "jobs", **signs},
            {"apiVersion": "mindxdl.gitee.com/v1", "kind": "AscendJob", "plural": "ascendjobs", **signs},
            {"apiVersion": "v1", "kind": "Pod", "plural": "pods", **signs},
        ]
    )
    _, asked = talk(
        lambda *_: (201, {"status": {"allowed": True}}),
        lambda api: missing(api, (), check_volumes=False, kinds=rows, trigger=True),
    )
    assert len(asked) == EACH + 4, "what is needed anyway is asked for once"
    assert {told(body) for _, _, body, _ in asked} >= {
        "list ascendjobs mindxdl.gitee.com", "watch ascendjobs mindxdl.gitee.com",
        "get configmaps", "create checkpointconversions ckpt2pt.dev",
    }  # fmt: skip


def test_what_a_lease_needs_is_told_with_its_name() -> None:
    def answer(_: str, __: str, body: Any) -> Answer:
        return 201, {"status": {"allowed": body["spec"]["resourceAttributes"]["verb"] != "update"}}

    found, asked = talk(answer, lambda api: missing_of_lease(api, "ops", "ours"))
    assert found == ["update leases.coordination.k8s.io ours in namespace ops"]
    assert sorted(told(body) for _, _, body, _ in asked) == [
        "create leases coordination.k8s.io",
        "get leases coordination.k8s.io ours",
        "update leases coordination.k8s.io ours",
    ]
