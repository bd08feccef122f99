"""Keep the pods of all Jobs in memory: a list in pages, then a watch, for ever.

kopf would hold each pod whole and give each a task; ten thousand of them need a quarter of the memory this way.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence

from ckpt2pt.conversion.job import MANAGER
from ckpt2pt.conversion.spec import API_VERSION, KIND, Json
from ckpt2pt_operator.api import CONVERSIONS, JOBS, PODS, Api, ApiError, Resource
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.views import child, items, job_view, number, pod_view, text
from ckpt2pt_operator.store import Store

SELECTOR = f"app.kubernetes.io/managed-by={MANAGER}"
_PAGE = "500"
_SERVER_SECONDS = "300"
_GONE = 410

log = logging.getLogger(__name__)


class PodInformer:
    """One namespace, or all of them where it is empty.  ``synced`` is set after the first list."""

    def __init__(self, api: Api, store: Store, metrics: Metrics, namespace: str) -> None:
        self._api, self._store, self._metrics, self.namespace = api, store, metrics, namespace
        self.synced = asyncio.Event()
        self.heard = time.monotonic()

    async def run(self) -> None:
        """List and watch; ends only when it is cancelled."""
        failures = 0
        while True:
            try:
                version = await self._list()
                failures = 0
                await self._follow(version)
            except ApiError as error:
                if error.code == _GONE:
                    continue
                failures += 1
                pause = max(min(0.5 * 2.0 ** min(failures, 6), 30.0) * random.uniform(0.8, 1.2), error.pause)
                log.warning("pods cannot be watched; again in %.1f s", pause, extra={"error": str(error)})
                await asyncio.sleep(pause)

    async def _list(self) -> str:
        """Every pod, in pages; returns the version that a watch goes on from."""
        more, seen = "", set[str]()
        while True:
            query = {"labelSelector": SELECTOR, "limit": _PAGE} | ({"continue": more} if more else {})
            page = await self._api.list(PODS, self.namespace, **query)
            for raw in items(page, "items"):
                pod = pod_view(raw)
                seen.add(pod.uid)
                self._store.put_pod(pod)
            self._hear()
            meta = child(page, "metadata")
            more = text(meta, "continue", 4096)
            if not more:
                self._store.keep_pods(self.namespace, seen)
                self.synced.set()
                return text(meta, "resourceVersion")

    async def _follow(self, version: str) -> None:
        """Watch from ``version`` on; a watch that the server ends is begun again where it was."""
        while True:
            query = {
                "labelSelector": SELECTOR,
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": _SERVER_SECONDS,
            }
            async for event in self._api.watch(PODS, self.namespace, **query):
                self._hear()
                version = self._take(text(event, "type"), child(event, "object")) or version

    def _take(self, kind: str, raw: Json) -> str:
        if kind == "ERROR":
            raise ApiError(number(raw, "code"), text(raw, "reason"), text(raw, "message"), what="watch pods")
        if kind in {"ADDED", "MODIFIED"}:
            pod = pod_view(raw)
            before = self._store.put_pod(pod)
            if before and before.finished is None and pod.started and pod.finished:
                self._metrics.stage_seconds.observe((pod.finished - pod.started).total_seconds())
        elif kind == "DELETED":
            self._store.drop_pod(pod_view(raw))
        return text(child(raw, "metadata"), "resourceVersion")

    def _hear(self) -> None:
        self.heard = time.monotonic()
        self._metrics.watch_last_event.labels("pods").set_to_current_time()


async def pages(api: Api, resource: Resource, namespace: str, **query: str) -> AsyncIterator[Json]:
    """Every object of a list, page by page."""
    more = ""
    while True:
        page = await api.list(resource, namespace, limit=_PAGE, **query, **({"continue": more} if more else {}))
        for raw in items(page, "items"):
            yield raw
        more = text(child(page, "metadata"), "continue", 4096)
        if not more:
            return


async def refresh(api: Api, store: Store, namespaces: Sequence[str]) -> None:
    """List conversions and Jobs anew: kopf tells nothing of what was deleted while its watch was interrupted."""
    jobs, conversions = store.held_jobs(), tuple(store.conversions.values())
    there: set[str] = set()
    for namespace in namespaces or ("",):
        async for raw in pages(api, JOBS, namespace, labelSelector=SELECTOR):
            job = job_view(raw)
            there.add(job.uid)
            store.put_job(job)
        async for raw in pages(api, CONVERSIONS, namespace):
            there.add(text(child(raw, "metadata"), "uid"))
            store.put_conversion({"apiVersion": API_VERSION, "kind": KIND} | raw)
    for job in jobs:
        if job.uid not in there:
            store.drop_job(job)
    for raw in conversions:
        if text(child(raw, "metadata"), "uid") not in there:
            store.drop_conversion(raw)
