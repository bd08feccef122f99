"""The proof of rights at the start."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apiserver import Answer
from ckpt2pt_operator import api, trainings
from ckpt2pt_operator.access import CLAIMS, DELETES, NEEDED, TRIGGER, missing, missing_of_lease
from ckpt2pt_operator.handlers import GROUP, PLURAL
from ckpt2pt_operator.rules.trainings import kinds
from talking import talk

EACH = sum(len(verbs) for *_, verbs in NEEDED)


def test_all_rights_are_asked_for_in_each_namespace() -> None:
    found, asked = talk(
        lambda *_: (201, {"status": {"allowed": True}}), lambda client: missing(client, ("a", "b"), check_volumes=True)
    )
    assert found == []
    assert len(asked) == 2 * (EACH + sum(len(verbs) for *_, verbs in CLAIMS))
    assert {body["spec"]["resourceAttributes"]["namespace"] for _, _, body, _ in asked} == {"a", "b"}


def test_what_is_missing_is_reported_as_an_administrator_would_grant_it() -> None:
    def answer(_: str, __: str, body: Any) -> Answer:
        wanted = body["spec"]["resourceAttributes"]
        refused = wanted["verb"] in {"patch", "update"} and wanted["resource"] != "events"
        return 201, {"status": {"allowed": not refused}}

    found, _ = talk(answer, lambda client: missing(client, (), check_volumes=False))
    assert found == [
        "update checkpointconversions.ckpt2pt.dev/status in all namespaces",
        "patch jobs.batch in all namespaces",
    ]


def test_an_answer_that_does_not_say_yes_is_a_no() -> None:
    found, _ = talk(
        lambda *_: (201, {"status": {"allowed": "true"}}), lambda client: missing(client, (), check_volumes=False)
    )
    assert len(found) == EACH


def reported(body: Any) -> str:
    found = body["spec"]["resourceAttributes"]
    return " ".join(filter(None, (found["verb"], found["resource"], found.get("group"), found.get("name"))))


def test_what_trainings_need_is_asked_for_where_they_are_watched() -> None:
    signs = {"succeeded": {"conditions": ["Complete"]}, "failed": {"conditions": ["Failed"]}}
    table = kinds(
        [
            {"apiVersion": "batch/v1", "kind": "Job", "plural": "jobs", **signs},
            {"apiVersion": "mindxdl.gitee.com/v1", "kind": "AscendJob", "plural": "ascendjobs", **signs},
            {"apiVersion": "v1", "kind": "Pod", "plural": "pods", **signs},
        ]
    )
    _, asked = talk(
        lambda *_: (201, {"status": {"allowed": True}}),
        lambda client: missing(client, (), check_volumes=False, kinds=table, trigger=True),
    )
    assert len(asked) == EACH + 4, "what is needed anyway is asked for once"
    assert {reported(body) for _, _, body, _ in asked} >= {
        "list ascendjobs mindxdl.gitee.com", "watch ascendjobs mindxdl.gitee.com",
        "get configmaps", "create checkpointconversions ckpt2pt.dev",
    }  # fmt: skip


def test_what_a_lease_needs_is_reported_with_its_name() -> None:
    def answer(_: str, __: str, body: Any) -> Answer:
        return 201, {"status": {"allowed": body["spec"]["resourceAttributes"]["verb"] != "update"}}

    found, asked = talk(answer, lambda client: missing_of_lease(client, "ops", "ours"))
    assert found == ["update leases.coordination.k8s.io ours in namespace ops"]
    assert sorted(reported(body) for _, _, body, _ in asked) == [
        "create leases coordination.k8s.io",
        "get leases coordination.k8s.io ours",
        "update leases coordination.k8s.io ours",
    ]


# ------------------------------------------------------------------------------------------------ what the code asks for

VERBS = {
    "get": "get", "list": "list", "watch": "watch", "create_object": "create", "patch": "patch", "put_status": "update",
    "delete": "delete", "pages": "list",
}  # fmt: skip
RESOURCES = {
    name: place for module in (api, trainings) for name, place in vars(module).items() if isinstance(place, tuple)
}


def rows(*tables: tuple[tuple[str, str, str, tuple[str, ...]], ...]) -> set[tuple[str, str, str]]:
    return {
        (verb, group, f"{resource}/{sub}" if sub else resource)
        for table in tables
        for group, resource, sub, verbs in table
        for verb in verbs
    }


def right(verb: str, constant: str, *, status: bool = False) -> tuple[str, str, str]:
    base, plural = RESOURCES[constant]
    _, group, *version = base.split("/")
    return verb, group if version else "", f"{plural}/status" if status else plural


def requests() -> Iterator[tuple[str, str, str]]:
    """Every request that names its resource, wherever it is in the code; none may hide its resource in a variable."""
    for path in sorted(Path(api.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            words = [ast.unparse(argument) for argument in node.args]
            owner, _, method = called.rpartition(".")
            named = [word for word in words if word in RESOURCES]
            if called == "super().__init__" and named:  # an informer
                yield from (right(verb, named[0]) for verb in ("list", "watch"))
            elif method in VERBS and (owner in {"api", "self._api"} or called == "pages"):
                if named:
                    yield right(VERBS[method], named[0], status=method == "put_status")
                else:
                    assert path.name == "informer.py", f"{path.name}:{node.lineno}: which resource is {words[0]}?"
            elif method == "_request" and named:  # in api.py itself, by method
                assert words[0] == "'POST'", words
                yield right("create", named[0])


def test_what_is_asked_for_at_the_start_is_what_the_code_requests() -> None:
    """No more and no less.  What kopf watches is not in our code; the chart's rules are held to the same tables."""
    kopf = {(verb, *kind) for kind in ((GROUP, PLURAL),) for verb in ("list", "watch")}
    # Whoever may list conversions may read them all, so `get` gives nothing away; people expect it with the others.
    spare = {("get", GROUP, PLURAL)}
    assert set(requests()) | kopf | spare == rows(NEEDED, CLAIMS, TRIGGER, DELETES)
