"""The HTTP session that kopf uses: what it asks for is counted, and what it gets of conversions is small.

kopf decodes a page of a list as a whole, makes a task for each object, and holds each for a while; 20 objects of 1.3 MB
need 700 MB that way.  So conversions are read here::

    list   --one object at a time-->  store;                       kopf gets the page without its items
    watch  --one object at a time-->  slim objects, in its place;  kopf hands them to its handler
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import cast

import aiohttp
import kopf

from ckpt2pt.kube.conversion.report import child, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.api import AGENT, CONVERSIONS, PLAIN
from ckpt2pt_operator.decoding import Page, decode, lines
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.kept import slim
from ckpt2pt_operator.store import Store

_PLURAL = CONVERSIONS[1]
_OBJECTS = frozenset({"ADDED", "MODIFIED", "DELETED"})
_BUSY = frozenset({408, *range(500, 600)})
_ANEW = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}).encode() + b"\n"
"""At this word kopf lists and watches anew; at any other error of a watch it ends."""

log = logging.getLogger(__name__)


class Conversions:
    """How the watches of conversions stand: one for each namespace, or one for all of them, named with an empty text."""

    def __init__(self, store: Store, metrics: Metrics, namespaces: tuple[str, ...]) -> None:
        self._store, self._metrics = store, metrics
        self._listed: dict[str, set[str]] = {}
        self._missing = set(namespaces or ("",))
        self.synced = asyncio.Event()
        """Set when all of them have been listed once."""
        self.received = time.monotonic()

    async def session(self, info: kopf.ConnectionInfo) -> kopf.AiohttpSession:
        """For the credentials of a connection."""
        traced = aiohttp.TraceConfig()
        traced.on_request_end.append(self._answered)
        traced.on_request_exception.append(self._failed)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers={**info.as_http_headers(), "User-Agent": AGENT, **PLAIN},
            proxy=info.proxy_url,
            trust_env=info.trust_env,
            middlewares=(self._read,),
            trace_configs=[traced],
        )
        return kopf.AiohttpSession(
            server=info.server, default_namespace=info.default_namespace, aiohttp_session=session
        )

    async def _read(self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        response = await handler(request)
        if response.status in _BUSY:
            # kopf ends for good after some tries, but for a connection that is lost it tries for ever.
            response.close()
            raise aiohttp.ClientConnectionError(f"{response.status} {response.reason}")
        *_, last = parts = request.url.path.split("/")
        namespace = parts[-2] if parts[-3:-2] == ["namespaces"] else ""
        if response.status == 200 and "watch" in request.url.query:
            response.content = cast("aiohttp.StreamReader", _Watched(response, self if last == _PLURAL else None))
        elif response.status == 200 and last == _PLURAL:
            found = _Listed(response, self, namespace, request.url.query)
            response.content = cast("aiohttp.StreamReader", found)
        return response

    # ------------------------------------------------------------------------------------------------------ what is read

    def begin(self, namespace: str) -> None:
        """The first page of a list is there."""
        self._listed[namespace] = set()

    def take(self, namespace: str, raw: Json) -> None:
        """One object of a list."""
        self.hear()
        self._listed.setdefault(namespace, set()).add(self._store.put_conversion(raw))

    def end(self, namespace: str) -> None:
        """It was the last page: what was not listed is gone."""
        self._store.keep_conversions(namespace, self._listed.pop(namespace, ()))
        self._missing.discard(namespace)
        if not self._missing:
            self.synced.set()

    def hear(self) -> None:
        """Something was received, if only that the API server does not answer: to be started anew would not bring it back."""
        self.received = time.monotonic()
        self._metrics.watch_last_event.labels(_PLURAL).set_to_current_time()

    # ---------------------------------------------------------------------------------------------------- what is counted

    async def _answered(self, _: object, __: object, ended: aiohttp.TraceRequestEndParams) -> None:
        self._count(ended.method, ended.url.path, "watch" in ended.url.query, str(ended.response.status))

    async def _failed(self, _: object, __: object, ended: aiohttp.TraceRequestExceptionParams) -> None:
        self.received = time.monotonic()
        self._count(ended.method, ended.url.path, "watch" in ended.url.query, "error")

    def _count(self, method: str, path: str, watches: bool, code: str) -> None:
        verb = ("watch" if watches else "list") if method == "GET" else method.lower()
        last = path.rstrip("/").rpartition("/")[2]
        kind = last if last in {_PLURAL, "customresourcedefinitions", "namespaces"} else "discovery"
        self._metrics.api_requests.labels(verb, kind, code).inc()


class _Listed:
    """In the place of the content of a page."""

    def __init__(
        self, response: aiohttp.ClientResponse, outer: Conversions, namespace: str, query: Mapping[str, str]
    ) -> None:
        self._inner, self._outer, self._namespace = response.content, outer, namespace
        self._first = "continue" not in query

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def read(self, _: int = -1) -> bytes:
        """The page without its items, which are in the store by then."""
        page = Page()
        if self._first:
            self._outer.begin(self._namespace)
        try:
            async for item in page.items(self._inner):
                self._outer.take(self._namespace, item)
            rest = decode(page.rest())
            if "items" not in rest:
                raise ValueError("not a list")
        except ValueError as error:  # something between here and there answered in its place, or cut it off
            raise aiohttp.ClientPayloadError(str(error)) from error
        if not text(child(rest, "metadata"), "continue", 4096):
            self._outer.end(self._namespace)
        return page.rest()


class _Watched:
    """In the place of the content of a watch; of conversions if ``outer`` is given."""

    def __init__(self, response: aiohttp.ClientResponse, outer: Conversions | None) -> None:
        self._inner, self._outer = response.content, outer

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        """The lines, with slim objects; whatever ends it before its time is a reason to list anew."""
        try:
            async for line in lines(self._inner):
                event = decode(line)
                if event.get("type") == "ERROR":
                    break
                yield self._slim(event) if self._outer else line + b"\n"
            else:
                return
        except ValueError as error:
            log.warning("a watch said what is no event; it is begun anew", extra={"error": str(error)})
        yield _ANEW

    def _slim(self, event: Json) -> bytes:
        cast("Conversions", self._outer).hear()
        if event.get("type") in _OBJECTS:
            event["object"] = slim(child(event, "object"))
        return json.dumps(event).encode() + b"\n"
