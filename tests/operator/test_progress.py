"""Asking workers: best effort, never trusted, never for long."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace

import pytest

from apiserver import Answer, Server
from ckpt2pt_operator import progress as module
from ckpt2pt_operator.progress import Progress
from ckpt2pt_operator.rules.views import Pod, Report, pod_view

RUNNING = pod_view(
    {
        "metadata": {"name": "p", "uid": "p"},
        "status": {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "containerStatuses": [{"name": "convert", "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}}}],
        },
    }
)


def ask(*pods: Pod) -> dict[str, Report]:
    async def run() -> dict[str, Report]:
        progress = Progress()
        try:
            return await progress.ask(pods)
        finally:
            await progress.close()

    return asyncio.run(run())


def answered(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Report]:
    server = Server(lambda *_: answer)
    monkeypatch.setattr(module, "PROGRESS_PORT", int(server.url.rsplit(":", 1)[1]))
    with server.running():
        return ask(RUNNING)


def test_a_worker_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answered((200, {"version": 1, "bytes": 5, "bytesTotal": 9, "throughput": 2}), monkeypatch)
    assert (found["p"].done, found["p"].total, found["p"].throughput) == (5, 9, 2)


@pytest.mark.parametrize(
    "answer", [(500, {}), (302, {}), (200, "not JSON"), (200, []), (200, {"version": 2}), (200, "x" * 100_000)],
    ids=["error", "elsewhere", "text", "list", "another-version", "much"],
)  # fmt: skip
def test_anything_else_is_no_answer(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered(answer, monkeypatch) == {}


def test_only_running_workers_with_an_address_are_asked() -> None:
    assert ask(replace(RUNNING, ip=""), replace(RUNNING, phase="Succeeded")) == {}


def test_silent_workers_cost_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(module, "PROGRESS_PORT", silent.getsockname()[1])
        began = time.monotonic()
        assert ask(*(replace(RUNNING, uid=str(number)) for number in range(200))) == {}
    assert time.monotonic() - began < 15


def test_an_answer_that_comes_in_pieces_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    text, over = json.dumps({"version": 1, "bytes": 5}), asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for part in (f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text[:7]}", text[7:]):
                writer.write(part.encode())
                await writer.drain()
                await asyncio.sleep(0.1)
        finally:
            writer.close()
            over.set()

    async def run() -> dict[str, Report]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        monkeypatch.setattr(module, "PROGRESS_PORT", server.sockets[0].getsockname()[1])
        progress = Progress()
        try:
            return await progress.ask([RUNNING])
        finally:
            await progress.close()
            await over.wait()
            server.close()

    assert asyncio.run(run())["p"].done == 5
