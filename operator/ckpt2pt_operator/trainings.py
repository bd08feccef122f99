"""Watch the workloads that conversions wait for, and make the conversions that annotated ones ask for.

The operator only reads trainings.  A conversion made for one has a name that comes from its uid, so a second try is a
conflict and no harm; runs that ended more than a day ago are left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.report import child, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.api import CONVERSIONS, Api, ApiError
from ckpt2pt_operator.informer import Informer
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.recent import remember
from ckpt2pt_operator.recorder import Recorder
from ckpt2pt_operator.rules.kept import Key, Name, key_of
from ckpt2pt_operator.rules.notes import Note
from ckpt2pt_operator.rules.seen import Training
from ckpt2pt_operator.rules.trainings import Kind, Workload, conversion_for, template_of, workload
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.workqueue import WorkQueue

CONFIG_MAPS = "api/v1", "configmaps"
_TOO_OLD = timedelta(days=1)
_REMEMBERED = 4096
"""Trainings that are gone whose end is still known: a Job with ttlSecondsAfterFinished 0 goes as soon as it has ended."""
_CONFLICT = 409

log = logging.getLogger(__name__)


class Trainings:
    """Every training of the kinds of the table, and the conversions that wait for them."""

    def __init__(
        self, api: Api, store: Store, metrics: Metrics, kinds: Sequence[Kind], namespaces: Sequence[str], *, trigger: bool,
        changed: Callable[[Key], None],
    ) -> None:  # fmt: skip
        self._api, self._store, self._trigger, self._changed = api, store, trigger, changed
        self._recorder = Recorder(api)
        self._known: dict[Name, Workload] = {}
        self._gone: dict[str, Workload] = {}
        self._due: WorkQueue[Workload] = WorkQueue(lambda training: training.namespace)
        self._kinds = {(kind.api_version, kind.kind): kind for kind in kinds}
        self.informers = [
            _Watch(api, metrics, kind, namespace, self) for kind in kinds for namespace in namespaces or ("",)
        ]

    async def look(self, conversion: Json, after: Json) -> Training:
        """How the workload that it waits for stands."""
        pair = text(after, "apiVersion"), text(after, "kind")
        if pair not in self._kinds:
            watched = ", ".join(" ".join(pair) for pair in sorted(self._kinds))
            return Training(state="Unwatched", message=watched)
        namespace = key_of(conversion)[0]
        listed = [
            watch for watch in self.informers if watch.kind == self._kinds[pair] and watch.namespace in {"", namespace}
        ]
        if not all(watch.synced.is_set() for watch in listed):
            return Training(state="Unknown", message="; ".join(watch.trouble for watch in listed if watch.trouble))
        found, seen = (
            self._known.get((*pair, namespace, text(after, "name"))),
            text(child(conversion, "status"), "trainingUID"),
        )
        if seen and (found is None or found.uid != seen):
            # It is gone, whether or not there is another one of its name by now.
            found = self._gone.get(seen)
        if found is None:
            return Training(state="Missing")
        return Training(state=found.state, uid=found.uid, message=found.message)

    # ----------------------------------------------------------------------------------------------------- what is seen

    def put(self, found: Workload) -> None:
        """A training as it is now."""
        name = found.api_version, found.kind, found.namespace, found.name
        before = self._known.get(name)
        if before == found:
            return
        if before is not None and before.uid != found.uid:
            self._remember(before)
        self._known[name] = found
        self._tell(name)
        if found.ended is None and before is not None and before.uid == found.uid and before.state == "Running":
            found = replace(found, ended=datetime.now(UTC))  # it does not tell, and has been seen at work
        if self._trigger and found.template and found.state == "Succeeded" and _is_recent(found):
            self._due.add(found)

    def drop(self, found: Workload) -> None:
        """A training is gone."""
        name = found.api_version, found.kind, found.namespace, found.name
        known = self._known.get(name)
        if known is not None and known.uid == found.uid:
            del self._known[name]
            self._remember(known)
            self._tell(name)

    def _remember(self, gone: Workload) -> None:
        """How it ended: whoever waits for it may not have looked in time."""
        if gone.state != "Running":
            remember(self._gone, gone.uid, gone, _REMEMBERED)

    def keep(self, kind: Kind, namespace: str, uids: Iterable[str]) -> None:
        """After a new list: every other training of that kind and namespace is gone."""
        kept = frozenset(uids)
        for found in list(self._known.values()):
            same = (found.api_version, found.kind) == (kind.api_version, kind.kind) and namespace in {
                "",
                found.namespace,
            }
            if same and found.uid not in kept:
                self.drop(found)
        # Also those that wait for one that is not there: nothing else would tell them.
        for name in self._store.trainings():
            if name[:2] == (kind.api_version, kind.kind) and namespace in {"", name[2]}:
                self._tell(name)

    def _tell(self, name: Name) -> None:
        """Wake the conversions that wait for it."""
        for key in self._store.waiting_for(name):
            self._changed(key)

    # ------------------------------------------------------------------------------------------------------- annotated

    async def run(self) -> None:
        """Make the conversions of annotated trainings; ends only when it is cancelled.

        What cannot be made is tried again for a day: people correct a template, and make a ConfigMap that was forgotten.
        """
        while True:
            training, _ = await self._due.get()
            making = asyncio.create_task(self._make(training))
            try:
                await asyncio.wait({making})
            finally:
                making.cancel()
                self._due.done(training)
            error = making.exception()
            if error is None:
                self._due.forget(training)
            else:
                self._again(training, error)

    def _again(self, training: Workload, error: BaseException) -> None:
        """Try it again later, as long as the run is recent; one template must not end the operator, whatever is in it."""
        about = {"training": f"{training.kind} {training.namespace}/{training.name}", "error": str(error)}
        if not isinstance(error, ApiError | UsageError):
            log.error("a bug; a conversion could not be made", exc_info=error, extra=about)
        if not _is_recent(training):
            log.warning("no conversion; given up", extra=about)
            self._due.forget(training)
            return
        pause = self._due.retry(training, error.pause if isinstance(error, ApiError) else 0.0)
        log.warning("no conversion yet; again in %.1f s", pause, extra=about)

    async def _make(self, training: Workload) -> None:
        reference: Json = {
            "apiVersion": training.api_version,
            "kind": training.kind,
            "metadata": {"namespace": training.namespace, "name": training.name, "uid": training.uid},
        }
        try:
            template = await self._api.get(CONFIG_MAPS, training.namespace, template_of(training))
            conversion = conversion_for(training, child(template, "data"))
            await self._api.create_object(CONVERSIONS, training.namespace, conversion)
        except UsageError as error:
            message = str(error).replace("\n", " ")
            await self._recorder.write(
                reference, Note(kind="Warning", reason="ConversionTemplateWrong", message=message)
            )
            raise
        except ApiError as error:
            if error.code == _CONFLICT:
                return
            if error.passing:
                raise
            # The words of an API server that finds a field wrong quote its value.
            why = f"{error.code} {error.reason}: {', '.join(error.fields) or error.message}"
            what = f"the conversion that ConfigMap {training.template} describes was not made: {why}"
            await self._recorder.write(reference, Note(kind="Warning", reason="ConversionNotMade", message=what))
            raise
        else:
            name = child(conversion, "metadata")["name"]
            await self._recorder.write(
                reference, Note(kind="Normal", reason="ConversionMade", message=f"CheckpointConversion {name} was made")
            )


def _is_recent(training: Workload) -> bool:
    """One of which nobody knows when it ended may be years old."""
    return training.ended is not None and datetime.now(UTC) - training.ended < _TOO_OLD


class _Watch(Informer):
    """The trainings of one kind."""

    def __init__(self, api: Api, metrics: Metrics, kind: Kind, namespace: str, trainings: Trainings) -> None:
        super().__init__(api, metrics, (kind.base, kind.plural), namespace)
        self.kind, self._trainings = kind, trainings

    def put(self, raw: Json) -> str:
        found = workload(raw, self.kind)
        self._trainings.put(found)
        return found.uid

    def drop(self, raw: Json) -> None:
        self._trainings.drop(workload(raw, self.kind))

    def keep(self, uids: Iterable[str]) -> None:
        self._trainings.keep(self.kind, self.namespace, uids)
