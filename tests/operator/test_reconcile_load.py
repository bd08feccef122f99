"""Hundreds of conversions at a time: nothing that the event loop calls holds it up."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt.kube.conversion.report import child
from ckpt2pt_operator.api import Bucket
from ckpt2pt_operator.main import Operator
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.reconcile import Reconciler
from ckpt2pt_operator.rules.seen import OperatorDefaults
from ckpt2pt_operator.settings import read
from documents import changed
from talking import api_of

MANY, STAGES, AT_MOST = 200, 64, 0.1


def conversion(number: int, namespace: str = "team") -> dict[str, Any]:
    document = changed(("spec.parallelism.pipeline", STAGES), ("spec.model.numLayers", STAGES))
    document["metadata"] |= {
        "name": f"c{number}", "uid": f"u{number}", "namespace": namespace, "generation": 1, "resourceVersion": "1",
    }  # fmt: skip
    return document


def yes_to_everything() -> Any:
    versions = count(2)

    def answer(method: str, path: str, body: Any) -> Answer:
        if "/persistentvolumeclaims/" in path:
            return 200, {"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}}
        if method == "GET":
            return 200, {"items": []}
        meta = {"resourceVersion": str(next(versions))}
        meta |= {"uid": f"uid-of-{body['metadata']['name']}"} if path.endswith("/jobs") else {}
        where = path.split("/namespaces/")[1].split("/", maxsplit=1)[0]
        given = conversion(int(body["metadata"]["name"][1:]), where) if path.endswith("/status") else {}
        return 200, given | body | {"metadata": given.get("metadata", {}) | body["metadata"] | meta}

    return answer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """Processor time of each callback: neither other programs of the machine count, nor what other tests left in memory."""
    found: list[tuple[float, str]] = []
    handles: Any = asyncio.Handle  # what runs a callback has no types
    real = handles._run

    def timed(handle: Any) -> None:
        # Its name only: to show an answer of aiohttp that has not come yet breaks it.
        began, what = time.thread_time(), str(getattr(handle._callback, "__qualname__", ""))
        real(handle)
        found.append((time.thread_time() - began, what))

    monkeypatch.setattr(handles, "_run", timed)
    gc.collect()
    gc.freeze()
    yield found
    gc.unfreeze()


async def work(
    server: Server,
    conversions: Iterable[dict[str, Any]],
    until: Callable[[Operator], bool],
    bucket: Bucket | None = None,
) -> Operator:
    """Look at conversions with four workers, as the operator does, until something is true."""
    operator, api = Operator(read(["--worker-image=i:1"], {})), api_of(server.url)
    api._bucket = bucket or api._bucket
    reconciler = Reconciler(api, operator._store, Metrics("0"), OperatorDefaults(image="i:1"), check_volumes=True)
    operator._conversions.synced.set()
    workers: list[asyncio.Task[None]] = []
    try:
        for each in conversions:
            operator._store.put_conversion(each)
        workers += [asyncio.create_task(operator._work(reconciler)) for _ in range(4)]
        async with asyncio.timeout(60):
            while not until(operator):
                assert not any(worker.done() for worker in workers)
                await asyncio.sleep(0.02)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
        await reconciler.close()
        await api.close()
    return operator


def made(server: Server, namespace: str) -> int:
    """Jobs of a namespace that were asked for."""
    return sum(method == "POST" and path.endswith(f"/{namespace}/jobs") for method, path, *_ in server.asked)


def test_no_callback_holds_up_the_loop(calls: list[tuple[float, str]]) -> None:
    server = Server(yes_to_everything())

    def begun(operator: Operator) -> bool:
        return all("jobUID" in child(kept.document() or {}, "status") for kept in operator._store.conversions.values())

    with server.running():
        operator = asyncio.run(work(server, map(conversion, range(MANY)), begun))
    looks = operator._metrics.registry.get_sample_value("ckpt2pt_operator_reconciles_total", {"result": "success"})
    assert looks
    assert looks >= 2 * MANY - 4
    assert len(calls) > looks
    assert max(calls) < (AT_MOST,), "an await is missing, or something is computed for too long"
    assert made(server, "team") == MANY, "each Job was asked for once"


def test_the_measure_sees_a_callback_that_takes_long(calls: list[tuple[float, str]]) -> None:
    async def busy() -> None:
        began = time.thread_time()
        while time.thread_time() - began < 2 * AT_MOST:
            pass

    asyncio.run(busy())
    assert max(calls) > (AT_MOST,)


def test_one_conversion_of_a_namespace_does_not_wait_for_two_thousand_of_another() -> None:
    """At 20 writes a second theirs take five minutes."""
    server = Server(yes_to_everything())
    theirs = [*(conversion(number, "many") for number in range(2000)), conversion(2000, "one")]
    with server.running():
        asyncio.run(work(server, theirs, lambda _: made(server, "one") > 0, Bucket(100.0, 1)))
    assert made(server, "one") == 1
    assert made(server, "many") <= 10, "first come, first served would be 2,000"
