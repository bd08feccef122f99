"""/healthz, /readyz and /metrics, and what they say.

Healthy: the event loop turns, and every watch sent something lately or the API server itself cannot be reached, which a
restart would not hint.  Ready: everything has been listed once, or another operator holds the lease.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ckpt2pt_operator.metrics import Metrics

MAX_LAG = 10.0
_TICK = 1.0


class Health:
    """``ready`` says why not, or nothing; ``stale`` says which watch is silent, or nothing."""

    def __init__(self, metrics: Metrics, *, refresh: Callable[[], None]) -> None:
        self._metrics, self._refresh = metrics, refresh
        self._ticked = time.monotonic()
        self.ready: Callable[[], str] = lambda: "starting"
        self.stale: Callable[[], str] = lambda: ""

    async def tick(self) -> None:
        """Show that the event loop turns; ends only when it is cancelled."""
        while True:
            self._ticked = time.monotonic()
            await asyncio.sleep(_TICK)

    @property
    def lag(self) -> float:
        """Seconds for which the event loop has not turned."""
        return max(0.0, time.monotonic() - self._ticked - _TICK)

    async def serve(self, port: int) -> web.AppRunner:
        """Listen on every address; ``cleanup()`` of what is returned ends it."""
        app = web.Application()
        app.add_routes(
            [web.get("/healthz", self._healthz), web.get("/readyz", self._readyz), web.get("/metrics", self._show)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, port).start()
        return runner

    async def _healthz(self, request: web.Request) -> web.Response:
        del request
        lag = self.lag
        problem = f"the event loop stood still for {lag:.0f} s" if lag > MAX_LAG else self.stale()
        return web.Response(text=problem or "ok", status=500 if problem else 200)

    async def _readyz(self, request: web.Request) -> web.Response:
        del request
        problem = self.ready()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    async def _show(self, request: web.Request) -> web.Response:
        del request
        self._refresh()
        return web.Response(
            body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        )
