"""Ask running workers how far they are: ``GET http://<pod>:8080/progress``.  Best effort, and never trusted.

A worker that cannot be reached costs two seconds and nothing else: the end of a stage is told by its Job and by its
termination message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from ckpt2pt.conversion.job import PROGRESS_PORT
from ckpt2pt_operator.rules.views import Pod, Report, report_of

_SECONDS = 2.0
_AT_ONCE = 32
_SECONDS_FOR_ALL = 4.0
"""For one conversion: a thousand workers that cannot be reached must not hold up the others."""
_MAX_BYTES = 4096


class Progress:
    """``ask`` gives what running workers tell now."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def ask(self, pods: Sequence[Pod]) -> dict[str, Report]:
        """The answers of those that answered, by pod uid."""
        running = [pod for pod in pods if pod.running and pod.ip]
        if not running:
            return {}
        asked = {asyncio.create_task(self._one(pod)): pod.uid for pod in running}
        try:
            done, _ = await asyncio.wait(asked, timeout=_SECONDS_FOR_ALL)
        finally:
            for task in asked:
                task.cancel()
        return {asked[task]: answer for task in done if (answer := task.result()) is not None}

    async def _one(self, pod: Pod) -> Report | None:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True))
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        async with self._slots:
            try:
                async with self._session.get(
                    f"http://{host}:{PROGRESS_PORT}/progress", allow_redirects=False
                ) as answer:
                    if answer.status != 200:
                        return None
                    data = bytearray()
                    async for part in answer.content.iter_any():
                        data += part
                        if len(data) > _MAX_BYTES:
                            return None
            except (aiohttp.ClientError, TimeoutError, OSError):
                return None
        return report_of(data.decode("utf-8", "replace"))

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
