"""Asking workers: best effort, never trusted, never for long."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from apiserver import Answer, Server
from ckpt2pt.kube.conversion.report import Report
from ckpt2pt_operator import progress as module
from ckpt2pt_operator.progress import Progress
from ckpt2pt_operator.rules.views import Pod, pod_view

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
    reported: dict[str, Report] = {}

    async def run() -> None:
        progress = Progress(lambda pod, report: reported.update({pod.uid: report}))
        try:
            await progress.ask(pods)
        finally:
            await progress.close()

    asyncio.run(run())
    return reported


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


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Workers behind a policy that drops packets: they take a connection, and say nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        monkeypatch.setattr(module, "PROGRESS_PORT", server.getsockname()[1])
        monkeypatch.setattr(module, "_SECONDS", 0.4)
        yield server


def test_silent_workers_hold_up_nobody(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    looks = [[replace(RUNNING, uid=f"{number}-{stage}") for stage in range(8)] for number in range(8)]
    times: list[float] = []

    async def run() -> None:
        progress = Progress(lambda *_: pytest.fail("nobody answers"))
        for _ in range(2):
            began = time.monotonic()
            for pods in looks:
                await progress.ask(pods)
            times.append(time.monotonic() - began)
            while progress._asked:
                await asyncio.sleep(0.05)
        assert len(progress._silent) == 64
        await progress.close()

    asyncio.run(run())
    assert times[0] < 2.4, "a moment for each look, until they are known"
    assert times[1] < 0.4, "and nothing from then on"


def test_who_was_silent_is_asked_again_but_not_waited_for(
    silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    reported: list[int] = []

    async def run() -> None:
        progress = Progress(lambda _, report: reported.append(report.done))
        await progress.ask([RUNNING])
        await progress._asked["p"]
        server = Server(lambda *_: (200, {"version": 1, "bytes": 7}))
        monkeypatch.setattr(module, "PROGRESS_PORT", int(server.url.rsplit(":", 1)[1]))
        with server.running():
            await progress.ask([RUNNING])
            assert reported == []
            await progress._asked["p"]
            assert reported == [7]
            await progress.ask([RUNNING])
            assert reported == [7, 7], "now it is known to answer"
        await progress.close()

    asyncio.run(run())


def test_one_that_is_not_up_yet_is_asked_at_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(module, "PROGRESS_PORT", port)

    async def run() -> None:
        progress = Progress(lambda *_: None)
        await progress.ask([RUNNING])
        assert (progress._asked, progress._silent) == ({}, {})
        await progress.close()

    asyncio.run(run())


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

    async def run() -> list[int]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        monkeypatch.setattr(module, "PROGRESS_PORT", server.sockets[0].getsockname()[1])
        reported: list[int] = []
        progress = Progress(lambda _, report: reported.append(report.done))
        try:
            await progress.ask([RUNNING])
            return reported
        finally:
            await progress.close()
            await over.wait()
            server.close()

    assert asyncio.run(run()) == [5]
