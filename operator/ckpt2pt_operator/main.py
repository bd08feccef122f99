"""``ckpt2pt-operator``: start everything, and end when any part of it ends.

settings -> health -> access proved -> (lease) -> watches -> workers
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import Any, cast

import kopf
from pythonjsonlogger.json import JsonFormatter

from ckpt2pt import __version__
from ckpt2pt.errors import Ckpt2ptError
from ckpt2pt_operator import access, handlers, lease, settings
from ckpt2pt_operator.api import CONVERSIONS, Api, ApiError
from ckpt2pt_operator.health import Health
from ckpt2pt_operator.informer import Informer, JobInformer, PodInformer
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.reconcile import Reconciler
from ckpt2pt_operator.rules.kept import Key, key_of
from ckpt2pt_operator.rules.seen import OperatorDefaults
from ckpt2pt_operator.settings import Settings
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.trainings import Trainings
from ckpt2pt_operator.transport import Conversions
from ckpt2pt_operator.workqueue import WorkQueue

PHASES = (
    "Pending", "Queued", "Suspended", "Running", "Following", "Succeeded", "Planned", "Failed", "Cancelled",
)  # fmt: skip
_CRD_SECONDS = 60.0
_SILENT_SECONDS = 400.0
"""Longer than the server lets a watch last: it is begun anew every five minutes at least."""
_DRAIN_SECONDS = 5.0
_NOT_FOUND, _CONFLICT = 404, 409

_PACKAGE = "ckpt2pt_operator"
_OF_EACH_RECORD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"})

log = logging.getLogger(_PACKAGE)


class CannotServeError(Exception):
    """Something is missing that only somebody else can give: a right, or the CRD."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes: 0; 64 for a wrong flag or file, 1 when it cannot go on."""
    try:
        given = settings.read(sys.argv[1:] if arguments is None else arguments)
    except Ckpt2ptError as error:
        sys.stderr.write(f"ckpt2pt-operator: {error}\n")
        return error.exit_code
    set_up_logging(given)
    log.info("ckpt2pt-operator %s", __version__, extra={"settings": {k: str(v) for k, v in given.reported().items()}})
    code = 0
    try:
        asyncio.run(Operator(given).serve())
    except* (CannotServeError, lease.LeaseLostError, ApiError) as group:
        for problem in group.exceptions:
            log.critical("%s", problem)
        code = 1
    except* asyncio.CancelledError:
        log.info("asked to stop before it had begun")
    return code


def _stop_on_signals() -> None:
    """Until kopf takes care of them.  The first process of a container has no default for a signal: it would be ignored."""
    serving = cast("asyncio.Task[None]", asyncio.current_task())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)


def _may_all(lacking: Sequence[str]) -> None:
    if lacking:
        raise CannotServeError(f"the service account may not {'; '.join(lacking)}: see the RBAC of the chart")


def set_up_logging(given: Settings) -> None:
    """One line for each record on standard error, as JSON with every extra field, or as text."""
    handler = logging.StreamHandler()
    if given.log_format == "json":
        names = {"levelname": "level", "name": "logger"}
        fields = "%(levelname)s %(name)s %(message)s"
        handler.setFormatter(JsonFormatter(fields, rename_fields=names, timestamp="time"))  # with its zone
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=given.log_level.upper(), handlers=[handler], force=True)
    if given.log_level != "debug":
        logging.getLogger("kopf").setLevel(logging.WARNING)


class _Text(logging.Formatter):
    """A line of text, with what our records say besides in JSON: of what it is given, and which error it was."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in logging
        """The line without a traceback."""
        ours = record.name.startswith(_PACKAGE)
        extra = [f"{name}={value}" for name, value in vars(record).items() if ours and name not in _OF_EACH_RECORD]
        return "; ".join([super().formatMessage(record), *extra])


class Operator:
    """Everything that lives as long as the process."""

    def __init__(self, given: Settings) -> None:
        self._given = given
        self._metrics = Metrics(__version__)
        self._queue: WorkQueue[Key] = WorkQueue(lambda key: key[0])
        self._store = Store(self._queue.add)
        self._health = Health(self._metrics, refresh=self._refresh_metrics)
        self._leading = asyncio.Event()
        self._conversions = Conversions(self._store, self._metrics, given.namespaces)
        self._informers: list[Informer] = []

    async def serve(self) -> None:
        """Until a signal comes, or a part of it fails."""
        given = self._given
        _stop_on_signals()
        runner = await self._health.serve(given.metrics_port)
        api = await Api.create(self._metrics, qps=given.qps, burst=given.burst)
        operator_defaults = OperatorDefaults(
            image=given.worker_image, pod=given.worker_defaults, allowed=frozenset(given.allow),
            deletes=given.delete_finished,
        )  # fmt: skip
        trainings = Trainings(
            api, self._store, self._metrics, given.training_kinds, given.namespaces, trigger=given.training_trigger,
            changed=self._queue.add,
        )  # fmt: skip
        reconciler = Reconciler(
            api, self._store, self._metrics, operator_defaults, check_volumes=given.check_volumes,
            live_progress=given.live_progress, trainings=trainings,
        )  # fmt: skip
        self._health.ready, self._health.stale = self._not_ready, self._silent
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [group.create_task(self._health.tick(), name="tick")]
                if given.leader_elect:
                    namespace = lease.own_namespace(given.lease_namespace)
                    _may_all(await access.missing_of_lease(api, namespace, given.lease_name))
                    holding = lease.hold(api, name=given.lease_name, namespace=namespace, held=self._leading)
                    helpers.append(group.create_task(holding, name="lease"))
                    log.info("waiting for the lease %s/%s", namespace, given.lease_name)
                    await self._leading.wait()
                self._leading.set()
                await self._prove(api)
                helpers += [
                    group.create_task(part, name=name) for name, part in self._parts(api, reconciler, trainings)
                ]
                await self._run_kopf()
                for helper in helpers:
                    helper.cancel()
        finally:
            await reconciler.close()
            await api.close()
            await runner.cleanup()

    def _parts(
        self, api: Api, reconciler: Reconciler, trainings: Trainings
    ) -> list[tuple[str, Coroutine[None, None, None]]]:
        namespaces = self._given.namespaces or ("",)
        self._informers = [
            kind(api, self._store, self._metrics, namespace)
            for kind in (JobInformer, PodInformer)
            for namespace in namespaces
        ]
        workers = range(self._given.concurrency)
        return [
            *((f"{informer.plural} {informer.namespace}", informer.run()) for informer in self._informers),
            *((f"worker {number}", self._work(reconciler)) for number in workers),
            *((f"trainings {watch.kind.plural}", watch.run()) for watch in trainings.informers),
            ("annotated trainings", trainings.run()),
            ("resync", self._resync()),
        ]

    async def _run_kopf(self) -> None:
        """kopf ends when a signal comes, and takes care of its own."""
        namespaces = self._given.namespaces
        await kopf.operator(
            registry=handlers.registry(self._store, self._conversions),
            settings=handlers.settings(namespaced=bool(namespaces)),
            # Otherwise it asks for the name of the user, and a pod's user often has none.
            identity=cast("Any", socket.gethostname()),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )

    # ----------------------------------------------------------------------------------------------------------- parts

    async def _prove(self, api: Api) -> None:
        """The API server is there, the CRD is there, and the rights are."""
        waited = time.monotonic()
        while True:
            try:
                version = await api.version()
                for namespace in self._given.namespaces or ("",):
                    await api.list(CONVERSIONS, namespace, key_of, limit="1")
                break
            except ApiError as error:
                if time.monotonic() - waited > _CRD_SECONDS:
                    hint = "apply crds/ of this version" if error.code == _NOT_FOUND else "see the RBAC of the chart"
                    raise CannotServeError(f"CheckpointConversions cannot be listed; {hint}: {error}") from error
                log.warning("CheckpointConversions cannot be listed yet", extra={"error": str(error)})
                await asyncio.sleep(2.0)
        given = self._given
        lacking = await access.missing(
            api, given.namespaces, check_volumes=given.check_volumes, kinds=given.training_kinds,
            trigger=given.training_trigger, deletes=given.delete_finished,
        )  # fmt: skip
        _may_all(lacking)
        log.info("API server %s", version)

    async def _work(self, reconciler: Reconciler) -> None:
        """Look at one conversion after another.  A bug in one look must not end the others, and is reported each time."""
        for synced in (self._conversions.synced, *(informer.synced for informer in self._informers)):
            await synced.wait()
        while True:
            key, waited = await self._queue.get()
            self._metrics.queue_latency.observe(waited)
            began = time.monotonic()
            look = asyncio.create_task(reconciler.reconcile(key))
            try:
                await asyncio.wait({look})
            except asyncio.CancelledError:
                await asyncio.wait({look}, timeout=_DRAIN_SECONDS)
                raise
            finally:
                self._queue.done(key)
            self._metrics.reconcile_seconds.observe(time.monotonic() - began)
            self._metrics.reconciles.labels(self._after(key, look)).inc()

    def _after(self, key: Key, look: asyncio.Task[float | None]) -> str:
        """When the next look is due; returns how this one went."""
        name = "/".join(key)
        error = look.exception()
        if error is None:
            again = look.result()
            self._queue.forget(key)
            if again is not None:
                self._queue.add(key, again)
            return "success"
        if isinstance(error, ApiError):
            pause = self._queue.retry(key, error.pause)
            level = logging.DEBUG if error.code == _CONFLICT else logging.WARNING
            log.log(level, "again in %.1f s", pause, extra={"conversion": name, "error": str(error)})
            return "conflict" if error.code == _CONFLICT else "error"
        pause = self._queue.retry(key)
        log.error("a bug; again in %.1f s", pause, exc_info=error, extra={"conversion": name})
        return "bug"

    async def _resync(self) -> None:
        """Look at everything now and then."""
        while True:
            await asyncio.sleep(self._given.resync_seconds)
            for key in list(self._store.conversions):
                self._queue.add(key)

    # ---------------------------------------------------------------------------------------------------------- health

    def _not_ready(self) -> str:
        if not self._leading.is_set():
            return ""  # a standby is as ready as it can be
        waits = [informer.plural for informer in self._informers if not informer.synced.is_set()]
        waits += [] if self._conversions.synced.is_set() else ["conversions"]
        return f"{' and '.join(dict.fromkeys(waits))} are not listed yet" if waits else ""

    def _silent(self) -> str:
        if not self._informers:
            return ""  # nothing is watched yet
        received = {informer.plural: informer.received for informer in self._informers}
        received |= {"conversions": self._conversions.received}
        quiet = [(time.monotonic() - at, what) for what, at in received.items()]
        longest, what = max(quiet)
        return f"nothing was received about {what} for {longest:.0f} s" if longest > _SILENT_SECONDS else ""

    def _refresh_metrics(self) -> None:
        for phase in PHASES:
            self._metrics.conversions.labels(phase).set(self._store.phases[phase])
        self._metrics.queue_depth.set(self._queue.ready(asyncio.get_running_loop().time()))


if __name__ == "__main__":
    sys.exit(main())
