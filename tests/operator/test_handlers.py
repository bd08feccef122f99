"""What kopf is reported: to be a transport, and nothing more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import kopf
import pytest

from ckpt2pt_operator import handlers
from ckpt2pt_operator.api import SILENCE
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.transport import Conversions
from documents import crd


@pytest.fixture
def store() -> Store:
    return Store(lambda _: None)


def registry_of(store: Store) -> kopf.OperatorRegistry:
    return handlers.registry(store, Conversions(store, Metrics("0"), ()))


def handle(store: Store, resource: str, kind: str, body: dict[str, Any]) -> None:
    """Call the one handler of a resource as kopf does."""
    registry = registry_of(store)
    [found] = [each for each in registry._watching.get_all_handlers() if resource in str(each.selector)]
    event = {"type": kind, "object": body}
    asyncio.run(found.fn(event=event))  # type: ignore[arg-type, call-arg]


CONVERSION: dict[str, Any] = {"metadata": {"namespace": "a", "name": "b", "uid": "u", "resourceVersion": "1"}}


def test_events_go_into_the_store(store: Store) -> None:
    handle(store, "checkpointconversions", "ADDED", CONVERSION)
    assert list(store.conversions) == [("a", "b")]
    handle(store, "checkpointconversions", "DELETED", CONVERSION)
    assert not store.conversions


def test_an_object_of_any_shape_does_no_harm(store: Store) -> None:
    for body in ({}, {"metadata": None}, {"metadata": {"annotations": "x"}, "spec": 3, "status": []}):
        handle(store, "checkpointconversions", "ADDED", body)


def test_there_are_only_event_handlers_so_nothing_is_written(store: Store) -> None:
    registry = registry_of(store)
    assert len(registry._watching.get_all_handlers()) == 1
    for other in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert not other.get_all_handlers()


@pytest.mark.parametrize("namespaced", [True, False])
def test_kopf_neither_posts_nor_peers_nor_scans_where_it_may_not(namespaced: bool) -> None:
    found = handlers.settings(namespaced=namespaced)
    assert found.peering.standalone
    assert not found.posting.enabled
    assert found.scanning.disabled is namespaced
    assert (found.watching.server_timeout, found.watching.client_timeout) == (300, 330), "the server ends a watch first"
    assert found.watching.inactivity_timeout == SILENCE, "an API server sends a bookmark each minute"


def test_group_and_plural_are_those_of_the_crd() -> None:
    spec = crd()["spec"]
    assert (spec["group"], spec["names"]["plural"]) == (handlers.GROUP, handlers.PLURAL)
    assert handlers.VERSION in [version["name"] for version in spec["versions"]]


@pytest.mark.parametrize(
    ("host", "server"), [("10.0.0.1", "https://10.0.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_a_pod_reaches_the_api_server_by_address(host: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def account(**_: object) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(server="https://kubernetes.default.svc", token="t")

    monkeypatch.setattr(kopf, "login_with_service_account", account)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    found = handlers.in_pod(handlers.settings(namespaced=False))
    assert found
    assert (found.server, found.token) == (server, "t")


def test_outside_of_a_pod_there_is_no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    del tmp_path
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert handlers.in_pod(handlers.settings(namespaced=False)) is None
