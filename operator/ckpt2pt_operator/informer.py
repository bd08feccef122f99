"""Keep objects of the cluster in memory, as few fields of each as are needed: a list in pages, then a watch, for ever."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable

from ckpt2pt.kube.conversion.job import MANAGER
from ckpt2pt.kube.conversion.report import child, number, report_of, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.api import JOBS, PODS, Api, ApiError, Found, Resource, patiently
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.stages import REASON_WORDS, cause
from ckpt2pt_operator.rules.views import job_view, pod_view
from ckpt2pt_operator.store import Store

SELECTOR = f"app.kubernetes.io/managed-by={MANAGER}"
_PAGE = "100"
_SERVER_SECONDS = "300"
_GONE = 410
_AT_ONCE = 1.0
_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What reading an object of a form that nobody expected may raise."""
_TRUSTED = 3
"""Failures in a row after which a watch is not begun again where it was: the API server may not be the same any more."""

log = logging.getLogger(__name__)


class Informer:
    """List in pages, then watch, for ever.  A subclass says what becomes of an object.

    One namespace, or all of them where it is empty.  ``synced`` is set after the first list; ``trouble`` says why it is
    not, or why nothing is received.
    """

    def __init__(self, api: Api, metrics: Metrics, resource: Resource, namespace: str, selector: str = "") -> None:
        self._api, self._metrics, self._resource, self.namespace = api, metrics, resource, namespace
        self._query = {"labelSelector": selector} if selector else dict[str, str]()
        self.plural = resource[1]
        self.synced = asyncio.Event()
        self.received = time.monotonic()
        self.trouble = ""
        self._failures, self._version = 0, ""

    def put(self, raw: Json) -> str:
        """It is there, and this is how; returns its uid."""
        raise NotImplementedError

    def drop(self, raw: Json) -> None:
        """It is gone."""
        raise NotImplementedError

    def keep(self, uids: Iterable[str]) -> None:
        """These are all that there are."""
        raise NotImplementedError

    async def run(self) -> None:
        """List and watch; ends only when it is cancelled."""
        while True:
            try:
                self._version = self._version or await self._list()
                await self._follow()
            except ApiError as error:
                self._failures += 1
                if not error.passing or self._failures > _TRUSTED:
                    self._version = ""
                if error.code == _GONE and self._failures == 1:
                    continue
                # It goes on trying, and to be started anew would not bring the API server back.
                self.received, self.trouble = time.monotonic(), str(error)
                pause = max(min(0.5 * 2.0 ** min(self._failures, 6), 30.0) * random.uniform(0.8, 1.2), error.pause)
                log.warning(
                    "%s cannot be watched; again in %.1f s", self._resource[1], pause, extra={"error": str(error)}
                )
                await asyncio.sleep(pause)

    async def _list(self) -> str:
        """Every object, in pages; returns the version that a watch goes on from."""
        more, seen = "", set[str]()
        while True:
            query = {**self._query, "limit": _PAGE} | ({"continue": more} if more else {})
            page = await self._api.list(self._resource, self.namespace, self._see, **query)
            seen.update(page.items)
            self._hear()
            more = page.more
            if not more:
                self.keep(seen)
                self.synced.set()
                return page.version

    async def _follow(self) -> None:
        """Watch from the last version on; a watch that ends, in whatever way, is begun again where it was."""
        while True:
            began, silent = time.monotonic(), True
            query = {
                **self._query,
                "resourceVersion": self._version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": _SERVER_SECONDS,
            }
            async for event in self._api.watch(self._resource, self.namespace, **query):
                self._hear()
                self._version = self._take(text(event, "type"), child(event, "object")) or self._version
                self._failures, silent = 0, False  # a list alone does not show that a watch works
            if silent and time.monotonic() - began < _AT_ONCE:
                raise ApiError(
                    0, "Closed", "the watch ended as soon as it had begun", what=f"watch {self._resource[1]}"
                )
            self._hear()

    def _take(self, kind: str, raw: Json) -> str:
        if kind == "ERROR":
            raise ApiError(number(raw, "code"), text(raw, "reason"), text(raw, "message"), what="watch")
        if kind in {"ADDED", "MODIFIED"}:
            self._see(raw)
        elif kind == "DELETED":
            self.drop(raw)
        return text(child(raw, "metadata"), "resourceVersion")

    def _see(self, raw: Json) -> str:
        """``put``: a bug costs one object, which may be anybody's, and not the watch of all."""
        try:
            return self.put(raw)
        except _ODD:
            meta = child(raw, "metadata")
            name = f"{self._resource[1]} {text(meta, 'namespace')}/{text(meta, 'name')}"
            log.exception("a bug; an object is not understood", extra={"object": name})
            return text(meta, "uid")

    def _hear(self) -> None:
        self.received, self.trouble = time.monotonic(), ""
        self._metrics.watch_last_event.labels(self._resource[1]).set_to_current_time()


class PodInformer(Informer):
    """The pods of all our Jobs.

    kopf would hold each pod whole and give each a task; ten thousand of them need a quarter of the memory this way.
    """

    def __init__(self, api: Api, store: Store, metrics: Metrics, namespace: str) -> None:
        super().__init__(api, metrics, PODS, namespace, SELECTOR)
        self._store = store

    def put(self, raw: Json) -> str:
        """Keep its view, and count a worker that has just ended."""
        pod = pod_view(raw)
        before = self._store.put_pod(pod)
        if before and before.finished is None and pod.started and pod.finished:
            self._metrics.stage_seconds.observe((pod.finished - pod.started).total_seconds())
            reason, _ = cause(pod, report_of(pod.report))
            known = reason if reason in REASON_WORDS else "Other"
            self._metrics.attempts.labels(*(("Failed", known) if reason else ("Succeeded", "Converted"))).inc()
        return pod.uid

    def drop(self, raw: Json) -> None:
        """Forget it."""
        self._store.drop_pod(pod_view(raw))

    def keep(self, uids: Iterable[str]) -> None:
        """Forget all others."""
        self._store.keep_pods(self.namespace, uids)


class JobInformer(Informer):
    """All our Jobs."""

    def __init__(self, api: Api, store: Store, metrics: Metrics, namespace: str) -> None:
        super().__init__(api, metrics, JOBS, namespace, SELECTOR)
        self._store = store

    def put(self, raw: Json) -> str:
        """Keep its view."""
        job = job_view(raw)
        self._store.put_job(job)
        return job.uid

    def drop(self, raw: Json) -> None:
        """Forget it."""
        self._store.drop_job(job_view(raw))

    def keep(self, uids: Iterable[str]) -> None:
        """Forget all others."""
        self._store.keep_jobs(self.namespace, uids)


async def pages(
    api: Api, resource: Resource, namespace: str, take: Callable[[Json], Found], **query: str
) -> AsyncIterator[Found]:
    """What ``take`` makes of every object of a list, page by page."""
    query["limit"] = _PAGE
    while True:
        page = await patiently(lambda: api.list(resource, namespace, take, **query))
        for found in page.items:
            yield found
        query["continue"] = page.more
        if not page.more:
            return
