"""The Lease: held, renewed, lost.  Two real operators take turns in tests/cluster."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from apiserver import Answer
from ckpt2pt_operator import lease as module
from ckpt2pt_operator.api import Api
from ckpt2pt_operator.lease import LeaseLostError, hold, own_namespace
from talking import talk

LEASES = "/apis/coordination.k8s.io/v1/namespaces/system/leases"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 4)
    monkeypatch.setattr(module, "RENEW_SECONDS", 3)
    monkeypatch.setattr(module, "RETRY_SECONDS", 1)


class Server:
    """An API server with one Lease, which may break after some writes."""

    def __init__(self, breaks_after: int) -> None:
        self.lease: Any = None
        self.left = breaks_after

    def __call__(self, method: str, path: str, body: Any) -> Answer:
        assert path.partition("?")[0] in {LEASES, f"{LEASES}/ours"}, path
        if method == "GET":
            return (200, self.lease) if self.lease else (404, {"reason": "NotFound", "code": 404})
        self.left -= 1
        if self.left < 0:
            return 500, {"message": "out of order"}
        self.lease = {**body, "apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        return (201 if method == "POST" else 200), self.lease


def test_a_lease_is_taken_renewed_and_its_loss_ends_the_operator() -> None:
    async def use(api: Api) -> bool:
        held = asyncio.Event()
        task = asyncio.create_task(hold(api, name="ours", namespace="system", held=held))
        await asyncio.wait_for(held.wait(), 20)
        with pytest.raises(LeaseLostError, match="system/ours could not be renewed"):
            await asyncio.wait_for(task, 40)
        return held.is_set()

    server = Server(breaks_after=3)
    still_held, asked = talk(server, use)
    assert not still_held
    assert asked[1][0] == "POST", "there was none"
    assert sum(method == "PUT" for method, *_ in asked) >= 2
    assert isinstance(server.lease["spec"]["leaseDurationSeconds"], int)


def test_the_namespace_is_the_given_one_or_that_of_the_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_namespace("given") == "given"
    file = tmp_path / "namespace"
    monkeypatch.setattr(module, "_OWN_NAMESPACE", file)
    assert own_namespace("") == "default"
    file.write_text("ours\n")
    assert own_namespace("") == "ours"


def test_a_network_that_breaks_off_is_a_failure_like_any_other() -> None:
    server, broken = Server(breaks_after=99), threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if broken.is_set():
            raise ConnectionResetError  # the connection ends without an answer
        return server(method, path, body)

    async def use(api: Api) -> str:
        held = asyncio.Event()
        task = asyncio.create_task(hold(api, name="ours", namespace="system", held=held))
        await asyncio.wait_for(held.wait(), 20)
        broken.set()
        with pytest.raises(LeaseLostError) as caught:
            await asyncio.wait_for(task, 40)
        return str(caught.value)

    assert "could not be renewed" in talk(answer, use)[0]


@pytest.mark.parametrize("silent", ["GET", "PUT"])
def test_it_ends_before_another_may_have_the_lease_however_long_requests_take(silent: str) -> None:
    """Whoever sees no renewal for ``LEASE_SECONDS`` takes it: an API server that hangs must not hide that."""
    server, over, renewed = Server(breaks_after=99), threading.Event(), [0.0]

    def answer(method: str, path: str, body: Any) -> Answer:
        if server.left <= 97 and method == silent:
            over.wait(20)
            raise ConnectionResetError
        if method != "GET":
            renewed[0] = time.monotonic()
        return server(method, path, body)

    async def use(api: Api) -> float:
        try:
            with pytest.raises(LeaseLostError):
                await asyncio.wait_for(hold(api, name="ours", namespace="system", held=asyncio.Event()), 40)
            return time.monotonic()
        finally:
            over.set()

    assert talk(answer, use)[0] - renewed[0] < module.LEASE_SECONDS
