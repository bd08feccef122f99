"""The few requests that the operator makes, as raw JSON, through ``kubernetes``' own async client.

Typed models cost several times the memory and time of the objects themselves, and drop what they do not know.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NamedTuple, TypeVar, cast

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from ckpt2pt import __version__
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.job import MANAGER
from ckpt2pt.kube.conversion.names import request_path
from ckpt2pt.kube.conversion.report import child, number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import API_VERSION
from ckpt2pt_operator.decoding import Page, decode, lines
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.views import items
from ckpt2pt_operator.workqueue import Turns

_TIMEOUT = 30
SILENCE = 100.0
"""Seconds without a word after which a watch is given up: an API server sends a bookmark each minute."""
_MAX_PAUSE = 300.0
_MAX_FIELDS = 8
_TRUE_TO = timedelta(seconds=5)
"""As far as a clock here may be from the API server's before that one's is taken: its answers tell whole seconds, and take a while."""
_TRIES = 7
"""Of what is asked patiently: a quarter of a minute in all, or as long as the API server asks for."""
_BAD_REQUEST, _FORBIDDEN = 400, 403
_MERGE_PATCH = "application/merge-patch+json"
_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})

AGENT = f"{MANAGER}/{__version__}"
"""Its first part is also the field manager of all that is written."""
PLAIN = {"Accept-Encoding": "identity"}
"""An API server would compress large answers, and 64 KiB of them may hold 60 MB."""

CONVERSIONS = f"apis/{API_VERSION}", "checkpointconversions"
JOBS = "apis/batch/v1", "jobs"
PODS = "api/v1", "pods"
EVENTS = "api/v1", "events"
CLAIMS = "api/v1", "persistentvolumeclaims"
Resource = tuple[str, str]
"""Where a kind is served, and its plural."""
Found = TypeVar("Found")


class Listed(NamedTuple, Generic[Found]):
    """A page of a list: ``more`` continues it, empty on the last one; a watch goes on from ``version``."""

    items: list[Found]
    more: str
    version: str


class ApiError(Exception):
    """The API server answered with an error, or not at all (``code`` 0).  ``pause`` is the least time to wait, in seconds.

    ``fields`` are those of an object that it finds wrong.
    """

    def __init__(
        self, code: int, reason: str, message: str, *, pause: float = 0.0, what: str = "", fields: Sequence[str] = ()
    ) -> None:
        super().__init__(f"{what}: {code} {reason}: {message}")
        self.code, self.reason, self.message, self.pause, self.what = code, reason, message, pause, what
        self.fields = tuple(fields)

    @property
    def passing(self) -> bool:
        """Trying again may help, and nothing is wrong with the request."""
        return self.code in {0, 408, 429} or self.code >= 500

    @property
    def ending(self) -> bool:
        """The namespace is being deleted, so that nothing can be made in it."""
        return self.code == _FORBIDDEN and "being terminated" in self.message


async def patiently(ask: Callable[[], Awaitable[Found]]) -> Found:
    """Ask again while the API server is busy or does not answer; it must be something that changes nothing."""
    for failures in range(1, _TRIES):
        try:
            return await ask()
        except ApiError as error:
            if not error.passing:
                raise
            await asyncio.sleep(max(min(0.2 * 2.0**failures, 5.0) * random.uniform(0.8, 1.2), error.pause))
    return await ask()


class Bucket:
    """``qps`` a second, ``burst`` at once; of those who wait, groups (namespaces) take turns."""

    def __init__(self, qps: float, burst: int) -> None:
        self._qps, self._burst, self._tokens, self._at = qps, float(burst), float(burst), 0.0
        self._waiting: Turns[asyncio.Future[None]] = Turns()

    async def take(self, group: str = "") -> None:
        """Wait for a turn."""
        turn = asyncio.get_running_loop().create_future()
        idle = not self._waiting
        self._waiting.add(group, turn)
        if idle:
            self._give()
        await turn

    def _give(self) -> None:
        """Let go who may, and come back when there is a token for the next."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._qps) if self._at else self._tokens
        self._at = now
        while self._waiting and self._tokens >= 1:
            turn = self._waiting.take()
            if not turn.done():  # who was cancelled has no use for it
                self._tokens -= 1
                turn.set_result(None)
        if self._waiting:
            loop.call_later((1 - self._tokens) / self._qps, self._give)


class Api:
    """Requests to one API server.  ``create`` makes it, ``close`` ends it."""

    def __init__(self, inner: client.ApiClient, metrics: Metrics, bucket: Bucket) -> None:
        self._inner: Any = inner  # half of it has no types
        self._metrics, self._bucket = metrics, bucket
        self._ahead = timedelta()

    @classmethod
    async def create(cls, metrics: Metrics, *, qps: float, burst: int) -> Api:
        """As the service account of the pod, or as the kubeconfig says."""
        configuration, load = client.Configuration(), cast("Any", config)
        try:
            load.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            try:
                await load.load_kube_config(client_configuration=configuration)
            except config.ConfigException as error:
                message = f"neither a pod's service account nor a kubeconfig says where the cluster is ({error})"
                raise ApiError(0, "NoCluster", message, what="start") from error
        configuration.connection_pool_maxsize = 64
        inner = client.ApiClient(configuration)
        cast("Any", inner).user_agent = AGENT
        return cls(inner, metrics, Bucket(qps, burst))

    @property
    def inner(self) -> client.ApiClient:
        """The library's own client, for its lease lock."""
        return cast("client.ApiClient", self._inner)

    async def close(self) -> None:
        """Close every connection."""
        await self._inner.close()

    def now(self) -> datetime:
        """The time by the API server's clock, which wrote all those that it is compared with."""
        return datetime.now(UTC) + self._ahead

    def _set_clock(self, date: str) -> None:
        try:
            ahead = parsedate_to_datetime(date) - datetime.now(UTC)
        except (ValueError, TypeError):
            return  # no date, or one without a zone
        self._ahead = ahead if abs(ahead) > _TRUE_TO else timedelta()

    # ------------------------------------------------------------------------------------------------------- requests

    async def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """One object."""
        return await self._request("GET", resource, namespace, name)

    async def list(
        self, resource: Resource, namespace: str, take: Callable[[Json], Found], **query: str
    ) -> Listed[Found]:
        """One page of a list, of each object what ``take`` makes of it; ``namespace`` may be empty.

        The objects are decoded one at a time, and gone before the next.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_TIMEOUT)
        asked = _Asked("list", resource, namespace)
        stream = await self._send(asked, "GET", query, None, "", timeout)
        page, found = Page(), list[Found]()
        try:
            if stream.status >= 400:
                raise self._refused(stream, await stream.read(), asked)
            async for item in page.items(stream.content):
                found.append(take(item))
            meta = child(decode(page.rest()), "metadata")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, "Interrupted", str(error) or type(error).__name__, what=str(asked)) from error
        finally:
            stream.release()
        return Listed(found, text(meta, "continue", 4096), text(meta, "resourceVersion"))

    async def create_object(self, resource: Resource, namespace: str, body: Json) -> Json:
        """Create an object; returns it as it was stored."""
        return await self._request("POST", resource, namespace, body=body)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Json) -> Json:
        """A JSON merge patch; with ``metadata.uid`` and ``resourceVersion`` in it, of that very object."""
        return await self._request("PATCH", resource, namespace, name, body=body, content=_MERGE_PATCH)

    async def put_status(self, resource: Resource, namespace: str, name: str, body: Json) -> Json:
        """Replace the status; 409 if the object has changed since."""
        return await self._request("PUT", resource, namespace, name, subresource="status", body=body)

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, version: str = "") -> Json:
        """Delete that very object, in that very version if it is given, and what it owns in the background."""
        same = {"uid": uid} | ({"resourceVersion": version} if version else {})
        body: Json = {"propagationPolicy": "Background", "preconditions": same}
        return await self._request("DELETE", resource, namespace, name, body=body)

    async def is_ending(self, namespace: str) -> bool:
        """Whether a namespace is being deleted, so that nothing can be made in it: asked without making anything."""
        about = {"kind": "Namespace", "name": namespace, "namespace": namespace}
        event: Json = {"metadata": {"generateName": "ckpt2pt-"}, "involvedObject": about, "type": "Normal"}
        try:
            await self._request("POST", EVENTS, namespace, query={"dryRun": "All"}, body=event)
        except ApiError as error:
            if error.code != _FORBIDDEN:
                raise
            return error.ending
        return False

    async def review_access(self, attributes: Json) -> Json:
        """May this operator do that."""
        review: Json = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        return await self._request(
            "POST", ("apis/authorization.k8s.io/v1", "selfsubjectaccessreviews"), "", body=review
        )

    async def version(self) -> str:
        """The version of the API server."""
        return text(await self._request("GET", ("version", ""), ""), "gitVersion")

    async def watch(self, resource: Resource, namespace: str, **query: str) -> AsyncIterator[Json]:
        """Events of a watch, one JSON object each, until the server ends it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE)
        asked = _Asked("watch", resource, namespace)
        stream = await self._send(asked, "GET", {**query, "watch": "true"}, None, "", timeout)
        try:
            if stream.status >= 400:
                raise self._refused(stream, await stream.read(), asked)
            async for line in lines(stream.content):
                yield decode(line)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, "Interrupted", str(error) or type(error).__name__, what=str(asked)) from error
        finally:
            stream.close()

    async def _request(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str | None = None,
        *,
        subresource: str = "",
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content: str = "application/json",
        verb: str = "",
    ) -> Json:
        if method in _WRITES:
            await self._bucket.take(namespace)
        asked = _Asked(verb or method.lower(), resource, namespace, name, subresource)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT, sock_connect=10)
        response = await self._send(asked, method, query or {}, body, content, timeout)
        try:
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, "Interrupted", str(error) or type(error).__name__, what=str(asked)) from error
        if response.status >= 400:
            raise self._refused(response, data, asked)
        try:
            return decode(data) if data else {}
        except ValueError as error:
            # Something between here and there answered in its place.
            raise ApiError(0, "NotJson", str(error), what=str(asked)) from error

    async def _send(
        self,
        asked: _Asked,
        method: str,
        query: Mapping[str, str],
        body: Json | None,
        content: str,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        headers = PLAIN | {"Accept": "application/json"} | ({"Content-Type": content} if content else {})
        try:
            path = request_path(asked.resource[0], asked.namespace, asked.resource[1], asked.name, asked.subresource)
        except UsageError as wrong:
            raise ApiError(_BAD_REQUEST, "BadRequest", wrong.what, what=asked.kind) from wrong
        code = "error"
        try:
            _, url, sent, payload, _ = await self._inner.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._inner.rest_client.request(
                method, url, headers=sent, body=payload, _request_timeout=timeout
            )
            response = cast("aiohttp.ClientResponse", answer.response)
            code = str(response.status)
            self._set_clock(response.headers.get("Date", ""))
        except ApiException as raised:
            error = cast("Any", raised)
            code = str(error.status)
            raise _error(error.status or 0, str(error.body or "").encode(), error.headers or {}, asked.kind) from raised
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"{asked.verb} {asked.kind}"
            raise ApiError(0, "Unreachable", str(error) or type(error).__name__, what=what) from error
        else:
            return response
        finally:
            self._metrics.api_requests.labels(asked.verb, asked.kind, code).inc()

    def _refused(self, response: aiohttp.ClientResponse, data: bytes, asked: _Asked) -> ApiError:
        error = _error(response.status, data, response.headers, str(asked))
        if error.code == _FORBIDDEN and not error.ending:
            self._metrics.api_forbidden.labels(asked.verb, asked.kind).inc()
        return error


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request is about; ``name`` None is the whole collection."""

    verb: str
    resource: Resource
    namespace: str
    name: str | None = None
    subresource: str = ""

    @property
    def kind(self) -> str:
        """What metrics call it."""
        return "/".join(filter(None, (self.resource[1] or "version", self.subresource)))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.verb, self.kind, self.name)))


def _error(code: int, data: bytes, headers: Mapping[str, str], what: str) -> ApiError:
    try:
        status = decode(data)
    except ValueError:
        status = {"message": data[:512].decode("utf-8", "replace")}
    details = child(status, "details")
    seconds, causes = number(details, "retryAfterSeconds"), items(details, "causes")
    fields = [field for cause in causes[:_MAX_FIELDS] if (field := text(cause, "field", 200))]
    after = headers.get("Retry-After", "")
    pause = float(after) if after.isdecimal() else float(seconds)
    pause = min(pause, _MAX_PAUSE)
    return ApiError(code, text(status, "reason"), text(status, "message"), pause=pause, what=what, fields=fields)
