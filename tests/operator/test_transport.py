"""kopf, as it is, against a server: its lists go into the store, its watches give slim objects, its requests are counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import kopf
import pytest

from apiserver import Answer, Server
from ckpt2pt_operator import handlers
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.transport import Conversions

Raw = dict[str, Any]
SERVED = {
    "v1": ("namespaces", "Namespace"),
    "apiextensions.k8s.io/v1": ("customresourcedefinitions", "CustomResourceDefinition"),
    f"{handlers.GROUP}/{handlers.VERSION}": (handlers.PLURAL, "CheckpointConversion"),
}
DEEP = "[" * 5000 + "]" * 5000
GONE = '{"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}\n'


def conversion(name: str, version: int, inside: str = "1", kind: str = "CheckpointConversion") -> str:
    meta = json.dumps({"namespace": "team", "name": name, "uid": name, "resourceVersion": str(version)})
    spec = f'{{"workers": {{"podOverrides": {{"spec": {{"x": {inside}}}}}}}}}'
    return f'{{"apiVersion": "ckpt2pt.dev/v1alpha1", "kind": "{kind}", "metadata": {meta}, "spec": {spec}}}'


def discovery(where: str) -> Raw | None:
    """What an API server serves, as kopf asks for it."""
    if where == "/api":
        return {"versions": ["v1"]}
    if where == "/apis":
        found = [dict(zip(("group", "version"), served.split("/"), strict=True)) for served in SERVED if "/" in served]
        return {"groups": [{"name": g["group"], "versions": [g], "preferredVersion": g} for g in found]}
    if (version := where.removeprefix("/apis/").removeprefix("/api/")) not in SERVED:
        return None
    plural, kind = SERVED[version]
    resource = {"name": plural, "kind": kind, "singularName": "", "namespaced": True, "verbs": ["list", "watch"]}
    return {"resources": [resource]}


class Cluster:
    """Answers of one list after another, each in pages, and of one watch after another."""

    def __init__(self, lists: list[list[list[str]]], watches: list[list[tuple[str, str]]]) -> None:
        self.lists, self.watches, self.agents = lists, watches, set[str]()

    def __call__(self, method: str, path: str, body: Any) -> Answer:
        del body
        assert method == "GET", "kopf writes nothing"
        where, query = urlsplit(path).path, {name: found[0] for name, found in parse_qs(urlsplit(path).query).items()}
        if (found := discovery(where)) is not None:
            return 200, found
        assert where.endswith(handlers.PLURAL), path
        if "watch" in query:
            if not self.watches:
                time.sleep(1)
                return 200, ""
            return 200, "".join(f'{{"type": "{kind}", "object": {raw}}}\n' for kind, raw in self.watches.pop(0))
        assert query["limit"] == "100"
        pages, at = self.lists[0], int(query.get("continue", "0"))
        meta = {"resourceVersion": "7"} | ({"continue": str(at + 1)} if at + 1 < len(pages) else {})
        if at + 1 == len(pages) and len(self.lists) > 1:
            self.lists.pop(0)
        return 200, f'{{"apiVersion": "v1", "items": [{",".join(pages[at])}], "metadata": {json.dumps(meta)}}}'


def run(
    cluster: Cluster,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[str, str, Any], Answer] | None = None,
) -> tuple[Store, Metrics, list[Raw]]:
    """Run kopf until something is true of the store; also what its handler was given.  ``answer`` is in the cluster's place."""
    store, metrics, given = Store(lambda _: None), Metrics("0"), list[Raw]()
    watched = Conversions(store, metrics, ("team",))
    real, server = store.put_conversion, Server(answer or cluster)
    server.headers, cluster.agents = {"Content-Type": "application/json"}, server.agents

    def put(raw: Raw) -> str:
        if watched.synced.is_set():
            given.append(raw)
        return real(raw)

    monkeypatch.setattr(store, "put_conversion", put)
    monkeypatch.setattr(kopf, "login_with_service_account", lambda **_: kopf.ConnectionInfo(server=server.url))
    settings = handlers.settings(namespaced=True)
    settings.watching.reconnect_backoff = 0.01
    settings.networking.error_backoffs = (0.01,)

    async def serve() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(
            kopf.operator(
                registry=handlers.registry(store, watched), settings=settings, standalone=True, namespaces=("team",),
                identity=cast("Any", "test"), stop_flag=stop,
            )
        )  # fmt: skip
        try:
            async with asyncio.timeout(30):
                while not until(store):
                    assert not running.done(), running.exception()
                    await asyncio.sleep(0.02)
        finally:
            stop.set()
            await asyncio.wait({running}, timeout=30)
        await running

    with server.running():
        asyncio.run(serve())
    return store, metrics, given


def test_conversions_of_any_size_and_depth_pass_through_kopf(monkeypatch: pytest.MonkeyPatch) -> None:
    large = "[" + ",".join(["{}"] * 400_000) + "]"
    cluster = Cluster(
        [[[conversion("a", 1), conversion("b", 2, large)], [conversion("c", 3, DEEP)]]],
        [
            [
                ("ADDED", conversion("d", 8, large)),
                ("MODIFIED", conversion("a", 9, DEEP)),
                ("DELETED", conversion("c", 10)),
            ]
        ],
    )

    def all_there(store: Store) -> bool:
        return (
            sorted(key[1] for key in store.conversions) == ["a", "b", "d"]
            and store.conversions["team", "a"].version == 9
        )

    store, _, given = run(cluster, all_there, monkeypatch)
    assert all(len(json.dumps(raw)) < 1000 for raw in given), "kopf was given them slim"
    assert ["spec" in raw for raw in given] == [False, False]
    assert {key[1]: "spec" in (kept.document() or {}) for key, kept in store.conversions.items()} == {
        "a": False, "b": False, "d": False,
    }  # fmt: skip


def test_what_a_new_list_does_not_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster([[[conversion("a", 1)], [conversion("b", 2)]], [[conversion("b", 2)]]], [])
    cluster.watches = [[("ERROR", json.dumps({"kind": "Status", "code": 410, "reason": "Expired"}))]]
    store, _, _ = run(cluster, lambda store: ("team", "a") not in store.conversions and store.conversions, monkeypatch)
    assert list(store.conversions) == [("team", "b")]


@pytest.mark.parametrize(
    "broken",
    [
        (
            200,
            '{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcdserver: leader changed"}}\n',
        ),
        (
            200,
            '{"type": "ERROR", "object": {"kind": "Status", "code": 504, "message": "Too large resource version"}}\n',
        ),
        (200, '{"type": "MODIFIED", "obj'),
        (200, "<html>a proxy answers</html>\n"),
        (200, "[1]\n"),
        (500, {"message": "etcdserver: request timed out"}),
        (503, "apiserver is shutting down"),
        (408, {}),
    ],
    ids=["error", "version", "half", "html", "list", "500", "503", "408"],
)
def test_a_watch_or_a_list_that_fails_in_any_way_is_begun_anew(broken: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf took each of these for its end, and the operator went with it."""
    cluster = Cluster([[[conversion("a", 1)], [conversion("b", 2)]], [[conversion("b", 2)]]], [])
    # The last watch is a quiet one: kopf, asked to stop while it lists anew, can overlook it (streaming_block).
    answers: dict[str, list[Answer]] = {"watch": [broken, (200, GONE)], "list": [broken] * 3}

    def answer(method: str, path: str, body: Any) -> Answer:
        verb = "watch" if "watch" in path else "list" if "limit" in path and cluster.lists else ""
        return answers[verb].pop(0) if verb and answers[verb] else cluster(method, path, body)

    store, _, _ = run(
        cluster, lambda store: ("team", "a") not in store.conversions and store.conversions, monkeypatch, answer
    )
    assert list(store.conversions) == [("team", "b")]


def test_its_requests_are_counted_and_carry_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster([[[conversion("a", 1)], []]], [[("BOOKMARK", conversion("", 30))]])
    _, metrics, _ = run(cluster, lambda _: not cluster.watches, monkeypatch)
    counted = {
        (sample.labels["verb"], sample.labels["resource"], sample.labels["code"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "ckpt2pt_operator_api_requests_total"
    }
    assert counted["list", handlers.PLURAL, "200"] == 2
    assert counted["watch", handlers.PLURAL, "200"] >= 1
    assert {agent.split("/")[0] for agent in cluster.agents} == {"ckpt2pt-operator"}
