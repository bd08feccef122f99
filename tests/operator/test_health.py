"""/healthz, /readyz and /metrics over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from ckpt2pt_operator import health as module
from ckpt2pt_operator.health import Health
from ckpt2pt_operator.metrics import Metrics


def asked(path: str, prepare: Callable[[Health], None] = lambda _: None) -> tuple[int, str]:
    async def run() -> tuple[int, str]:
        health = Health(Metrics("9"), refresh=lambda: None)
        prepare(health)
        runner = await health.serve(0)
        try:
            port = runner.addresses[0][1]
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status, await answer.text()
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_it_is_not_ready_before_somebody_says_so() -> None:
    assert asked("/readyz") == (503, "starting")
    assert asked("/readyz", lambda health: setattr(health, "ready", lambda: "")) == (200, "ok")


def test_it_is_healthy_until_a_watch_is_silent() -> None:
    assert asked("/healthz") == (200, "ok")
    assert asked("/healthz", lambda health: setattr(health, "stale", lambda: "silent")) == (500, "silent")


def test_an_event_loop_that_stands_still_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LAG", -1.0)
    status, text = asked("/healthz")
    assert status == 500
    assert "stood still" in text


def test_the_loop_turns_while_it_ticks() -> None:
    async def run() -> float:
        health = Health(Metrics("0"), refresh=lambda: None)
        task = asyncio.create_task(health.tick())
        await asyncio.sleep(0.05)
        lag = health.lag
        task.cancel()
        return lag

    assert asyncio.run(run()) == 0.0


def test_metrics_are_refreshed_before_they_are_shown() -> None:
    async def run() -> str:
        metrics = Metrics("9")
        health = Health(metrics, refresh=lambda: metrics.queue_depth.set(3))
        runner = await health.serve(0)
        try:
            port = runner.addresses[0][1]
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                return await answer.text()
        finally:
            await runner.cleanup()

    assert "ckpt2pt_operator_queue_depth 3.0" in asyncio.run(run())
