"""Ask running workers how far they are: ``GET http://<pod>:8080/progress``.  Best effort, and never trusted.

A look waits for answers for a moment; one that comes later is there for the next look.  Who was silent once, behind a
network policy or on a lost node, is asked seldom and not waited for: the end of a stage is known by its Job and by its
termination message.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import aiohttp

from ckpt2pt.kube.conversion.job import PROGRESS_PORT
from ckpt2pt.kube.conversion.report import Report, report_of
from ckpt2pt_operator.recent import remember
from ckpt2pt_operator.rules.views import Pod

_SECONDS = 2.0
_AT_ONCE = 32
_PATIENCE = 0.25
_PAUSE = 60.0
_REMEMBERED = 4096
_MAX_BYTES = 4096


class Progress:
    """``ask`` has running workers asked; ``on_report`` gets what one answers, then or later."""

    def __init__(self, on_report: Callable[[Pod, Report], None]) -> None:
        self._on_report = on_report
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, float] = {}

    async def ask(self, pods: Sequence[Pod]) -> None:
        """Ask them, each once at a time, and wait a moment for those that are known to answer."""
        awaited: list[asyncio.Task[None]] = []
        for pod in pods:
            if not pod.running or not pod.ip or time.monotonic() < self._silent.get(pod.uid, 0.0):
                continue
            task = self._asked.get(pod.uid)
            if task is None:
                task = self._asked[pod.uid] = asyncio.create_task(self._one(pod))
                task.add_done_callback(partial(self._asked.pop, pod.uid))
            if pod.uid not in self._silent:
                awaited.append(task)
        if awaited:
            await asyncio.wait(awaited, timeout=_PATIENCE)

    async def _one(self, pod: Pod) -> None:
        async with self._slots:
            try:
                data = await self._get(pod)
            except TimeoutError:
                remember(self._silent, pod.uid, time.monotonic() + _PAUSE, _REMEMBERED)
                return
            except (aiohttp.ClientError, OSError):
                return
        self._silent.pop(pod.uid, None)
        report = report_of(data.decode("utf-8", "replace"))
        if report is not None:
            self._on_report(pod, report)

    async def _get(self, pod: Pod) -> bytes:
        """The answer; no bytes where it is not one of ours."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True))
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        data = bytearray()
        url = f"http://{host}:{PROGRESS_PORT}/progress"
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status == 200:
                async for part in answer.content.iter_any():
                    data += part
                    if len(data) > _MAX_BYTES:
                        return b""
        return bytes(data)

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in tuple(self._asked.values()):
            task.cancel()
        if self._session is not None:
            await self._session.close()
