"""The HTTP session that kopf uses: what it asks for is counted, and what it gets of conversions is small.

kopf decodes a page of a list as a whole, makes a task for each object, and holds each for a while; 20 objects of 1.3 MB
need 700 MB that way.  So conversions are read here::

    list   --one object at a time-->  store;                       kopf gets the page without its items
    watch  --one object at a time-->  slim objects, in its place;  kopf hands them to its handler
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import cast

import aiohttp
import kopf

from ckpt2pt.conversion.spec import Json
from ckpt2pt_operator.api import AGENT, CONVERSIONS, PLAIN
from ckpt2pt_operator.decoding import Page, decode, lines
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.kept import slim
from ckpt2pt_operator.rules.views import child, text
from ckpt2pt_operator.store import Store

_PLURAL = CONVERSIONS[1]
_OBJECTS = frozenset({"ADDED", "MODIFIED", "DELETED"})


class Conversions:
    """How the watches of conversions stand: one for each namespace, or one for all of them, named with an empty text."""

    def __init__(self, store: Store, metrics: Metrics, namespaces: tuple[str, ...]) -> None:
        self._store, self._metrics = store, metrics
        self._listed: dict[str, set[str]] = {}
        self._missing = set(namespaces or ("",))
        self.synced = asyncio.Event()
        """Set when all of them have been listed once."""
        self.heard = time.monotonic()

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
        *_, last = parts = request.url.path.split("/")
        if response.status == 200 and request.method == "GET" and last == _PLURAL:
            namespace = parts[-2] if parts[-3] == "namespaces" else ""
            query = request.url.query
            found = _Watched(response, self) if "watch" in query else _Listed(response, self, namespace, query)
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
        """Something was heard, if only that the API server does not answer: to be started anew would not bring it back."""
        self.heard = time.monotonic()
        self._metrics.watch_last_event.labels(_PLURAL).set_to_current_time()

    # ---------------------------------------------------------------------------------------------------- what is counted

    async def _answered(self, _: object, __: object, told: aiohttp.TraceRequestEndParams) -> None:
        self._count(told.method, told.url.path, "watch" in told.url.query, str(told.response.status))

    async def _failed(self, _: object, __: object, told: aiohttp.TraceRequestExceptionParams) -> None:
        self.heard = time.monotonic()
        self._count(told.method, told.url.path, "watch" in told.url.query, "error")

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
        async for item in page.items(self._inner):
            self._outer.take(self._namespace, item)
        if not text(child(decode(page.rest()), "metadata"), "continue", 4096):
            self._outer.end(self._namespace)
        return page.rest()


class _Watched:
    """In the place of the content of a watch."""

    def __init__(self, response: aiohttp.ClientResponse, outer: Conversions) -> None:
        self._inner, self._outer = response.content, outer

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        """The lines, with slim objects."""
        async for line in lines(self._inner):
            self._outer.hear()
            event = decode(line)
            if event.get("type") in _OBJECTS:
                event["object"] = slim(child(event, "object"))
            yield json.dumps(event).encode() + b"\n"
