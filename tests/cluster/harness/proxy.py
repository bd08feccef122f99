"""A bad network between the operator and a real API server: HTTP in, TLS out, and faults as a test scripts them."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
from aiohttp import web

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOP = frozenset({"host", "connection", "transfer-encoding", "content-length", "content-encoding", "accept-encoding"})


@dataclass(frozen=True, slots=True)
class Call:
    """One request: what it asks for, and how many of its kind came before it."""

    method: str
    resource: str
    watch: bool
    before: int

    @property
    def writes(self) -> bool:
        """Whether it changes an object: a review of rights is asked for by POST and stored nowhere."""
        return self.method in WRITES and self.resource != "selfsubjectaccessreviews"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What befalls a request.  ``lost`` closes the connection before the server is called with it, or before it has answered."""

    delay: float = 0.0
    status: int = 0
    retry_after: int = 0
    lost: Literal["", "request", "answer"] = ""
    gone: bool = False


Script = Callable[[Call], Fault | None]


@dataclass(eq=False, slots=True)
class _Watch:
    """A watch that is open: ``cut`` ends it, a muted one says nothing any more and stays open."""

    cut: asyncio.Event = field(default_factory=asyncio.Event)
    muted: bool = False


def resource_of(path: str) -> str:
    """``/apis/batch/v1/namespaces/x/jobs/demo`` -> ``jobs``; with the subresource, if there is one."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        parts = parts[2:]
    return "/".join(parts[0:1] + parts[2:3])


class Proxy:
    """One for a test.  ``script`` may be replaced at any time; ``done`` counts (method, resource, status) of writes."""

    def __init__(self, server: str, certificates: Path) -> None:
        self._server, self._certificates = server, certificates
        self.script: Script = lambda _: None
        self.after_write: Callable[[Call], None] = lambda _: None
        self.done: Counter[tuple[str, str, int]] = Counter()
        self.calls: Counter[tuple[str, str, bool]] = Counter()
        self.url = ""
        self._watches: set[_Watch] = set()
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def running(self) -> Generator[Proxy]:
        """While the block runs."""
        ready, stop = threading.Event(), asyncio.Event()
        thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(ready, stop)), daemon=True)
        thread.start()
        if not ready.wait(20):
            raise TimeoutError("the proxy does not listen")
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(stop.set)
            thread.join()
            self._loop.close()

    def kubeconfig(self, path: Path) -> Path:
        """Write the kubeconfig of whoever is to come through here."""
        named: dict[str, object] = {
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
        }
        head = {"apiVersion": "v1", "kind": "Config", "current-context": "proxy"}
        path.write_text(json.dumps(head | named))
        return path

    def cut_watches(self) -> None:
        """End every watch that is open, as a load balancer does."""
        for watch in tuple(self._watches):
            self._loop.call_soon_threadsafe(watch.cut.set)

    def mute_watches(self) -> None:
        """Let every watch that is open say nothing more, and stay open: a connection whose other end is gone."""
        for watch in tuple(self._watches):
            watch.muted = True

    def written(self, method: str, resource: str) -> int:
        """Writes of a kind that the server carried out."""
        return sum(n for (m, r, status), n in self.done.items() if (m, r) == (method, resource) and status < 300)

    def writes(self) -> int:
        """Everything that was asked to be written, whatever came of it."""
        return sum(
            n for (method, resource, _), n in self.calls.items() if Call(method, resource, watch=False, before=0).writes
        )

    # ------------------------------------------------------------------------------------------------------- its thread

    async def _serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        context = ssl.create_default_context(cafile=str(self._certificates / "ca.crt"))
        context.load_cert_chain(self._certificates / "admin.crt", self._certificates / "admin.key")
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(session, request)

            app = web.Application(client_max_size=16 << 20)
            app.router.add_route("*", "/{path:.*}", handle)
            no_progress = logging.getLogger("no_progress")
            no_progress.disabled = True  # each scripted loss would be reported as an error of the handler
            runner = web.AppRunner(app, access_log=None, logger=no_progress, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            ready.set()
            await stop.wait()
            for watch in tuple(self._watches):
                watch.cut.set()
            await runner.cleanup()
        await asyncio.sleep(0.3)  # connections that were aborted close in the loop's next turns

    async def _handle(self, session: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") == "true"
        kind = request.method, resource_of(request.path), watch
        call = Call(*kind, before=self.calls[kind])
        self.calls[kind] += 1
        fault = self.script(call) or Fault()
        await asyncio.sleep(fault.delay)
        if fault.lost == "request":
            raise _hang_up(request)
        if fault.status:
            self._count(call, fault.status)
            return _refuse(fault)
        if watch:
            return await self._watch(session, request, gone=fault.gone)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        body = await request.read() or None
        try:
            async with session.request(
                request.method, self._server + request.raw_path, headers=headers, data=body
            ) as answer:
                data = await answer.read()
        except aiohttp.ClientError as error:  # the API server itself is away
            raise _hang_up(request) from error
        self._count(call, answer.status)
        if call.writes:
            self.after_write(call)
        if fault.lost == "answer":
            raise _hang_up(request)
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        return web.Response(status=answer.status, body=data, headers=kept)

    def _count(self, call: Call, status: int) -> None:
        if call.writes:
            self.done[call.method, call.resource, status] += 1

    async def _watch(self, session: aiohttp.ClientSession, request: web.Request, *, gone: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        watch = _Watch()
        self._watches.add(watch)
        ended = asyncio.create_task(watch.cut.wait())
        passing = asyncio.create_task(self._pass_on(session, request, response, watch, gone=gone))
        try:
            await asyncio.wait({ended, passing}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                raise _hang_up(request)
            passing.result()
        finally:
            self._watches.discard(watch)
            ended.cancel()
            passing.cancel()
            await asyncio.gather(ended, passing, return_exceptions=True)
        return response

    async def _pass_on(
        self, session: aiohttp.ClientSession, request: web.Request, response: web.StreamResponse, watch: _Watch, *,
        gone: bool,
    ) -> None:  # fmt: skip
        headers = {"Accept": "application/json"}
        try:
            async with session.get(
                self._server + request.raw_path, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
            ) as answer:
                response.set_status(answer.status)
                await response.prepare(request)
                if gone:
                    status = {
                        "kind": "Status",
                        "apiVersion": "v1",
                        "status": "Failure",
                        "reason": "Expired",
                        "code": 410,
                    }
                    await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
                    return
                async for data in answer.content.iter_any():
                    if not watch.muted:
                        await response.write(data)
                if watch.muted:
                    await watch.cut.wait()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _hang_up(request) from error


def _hang_up(request: web.Request) -> ConnectionResetError:
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError("as scripted")


def _refuse(fault: Fault) -> web.Response:
    document = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": fault.status,
        "reason": "TooManyRequests" if fault.status == 429 else "ServerError", "message": "as scripted",
    }  # fmt: skip
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after else {}
    return web.json_response(document, status=fault.status, headers=headers)
