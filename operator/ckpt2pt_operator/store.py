"""What has been seen of the cluster, in memory: conversions packed, Jobs and pods as their views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ckpt2pt.kube.conversion.report import Report, child, number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.status import TERMINAL
from ckpt2pt_operator.recent import remember
from ckpt2pt_operator.rules.kept import Kept, Key, Name, keep, key_of
from ckpt2pt_operator.rules.views import Job, Pod, is_of

_REMEMBERED = 4096


def _order(version: str) -> int:
    return int(version) if version.isdecimal() else 0


class Store:
    """Written by the watches and by whoever wrote to the API server; ``changed`` is given the key of a conversion."""

    def __init__(self, changed: Callable[[Key], None]) -> None:
        self._changed = changed
        self.conversions: dict[Key, Kept] = {}
        self.phases: Counter[str] = Counter()
        """How many conversions there are of each phase."""
        self.live: dict[str, Report] = {}
        self._keys: dict[str, Key] = {}
        self._jobs: dict[str, dict[str, Job]] = {}
        self._pods: dict[str, dict[str, Pod]] = {}
        self._gone: dict[str, None] = {}
        self._departed: dict[str, dict[str, Pod]] = {}
        self._waiting: dict[Name, dict[Key, None]] = {}

    # ---------------------------------------------------------------------------------------------------- conversions

    def put_conversion(self, raw: Json) -> str:
        """It is there, and this is how; one that is older than what is known is not news.  Returns its uid."""
        key, meta = key_of(raw), child(raw, "metadata")
        uid, known = text(meta, "uid"), self.conversions.get(key)
        if known is not None and known.uid == uid and number(meta, "resourceVersion") <= known.version:
            return uid
        kept = keep(raw)
        if known is not None:
            self._forget(key, known)
        self.conversions[key] = kept
        self.phases[kept.phase] += 1
        self._keys[uid] = key
        if kept.phase in TERMINAL:
            self._departed.pop(uid, None)
        if kept.training:
            self._waiting.setdefault(kept.training, {})[key] = None
        self._changed(key)
        return uid

    def drop_conversion(self, raw: Json) -> None:
        """It is gone; what it owned is collected by the API server."""
        self._lose_conversion(key_of(raw), text(child(raw, "metadata"), "uid"))

    def keep_conversions(self, namespace: str, uids: Iterable[str]) -> None:
        """After a new list: every other conversion of that namespace (empty: of all) is gone."""
        kept = frozenset(uids)
        for key, known in list(self.conversions.items()):
            if known.uid not in kept and namespace in {"", key[0]}:
                self._lose_conversion(key, known.uid)

    def trainings(self) -> tuple[Name, ...]:
        """Every training that a conversion waits for."""
        return tuple(self._waiting)

    def waiting_for(self, training: Name) -> tuple[Key, ...]:
        """The conversions that begin, or end, when that training has ended."""
        return tuple(self._waiting.get(training, ()))

    def _lose_conversion(self, key: Key, uid: str) -> None:
        known = self.conversions.get(key)
        if known is not None and known.uid == uid:
            self._forget(key, known)
            self._departed.pop(uid, None)
            del self.conversions[key]
        self._changed(key)

    def _forget(self, key: Key, known: Kept) -> None:
        self._keys.pop(known.uid, None)
        self.phases[known.phase] -= 1
        if known.training:
            del self._waiting[known.training][key]
            if not self._waiting[known.training]:
                del self._waiting[known.training]

    # ---------------------------------------------------------------------------------------------------- Jobs and pods

    def put_job(self, job: Job) -> None:
        """A Job as it is now."""
        known = self._jobs.get(job.owner, {}).get(job.uid)
        if job.uid in self._gone or (known is not None and _order(job.version) < _order(known.version)):
            return
        self._jobs.setdefault(job.owner, {})[job.uid] = job
        self._tell(job)

    def drop_job(self, job: Job) -> None:
        """A Job was deleted: its uid does not come back, whatever an earlier question is answered with."""
        remember(self._gone, job.uid, None, _REMEMBERED)
        self._drop(self._jobs, job)

    def put_pod(self, pod: Pod) -> Pod | None:
        """A pod as it is now; returns what it was before, if it is of a conversion.

        An answer that is older than the watch is not news.
        """
        before = self._pods.get(pod.owner, {}).get(pod.uid)
        if pod.uid in self._gone or (before is not None and _order(pod.version) < _order(before.version)):
            return None
        self._pods.setdefault(pod.owner, {})[pod.uid] = pod
        return before if self._tell(pod) else None

    def put_live(self, pod: Pod, report: Report) -> None:
        """What a worker tells while it runs."""
        if pod.uid in self._pods.get(pod.owner, {}):
            self.live[pod.uid] = report

    def drop_pod(self, pod: Pod) -> None:
        """A pod was deleted, as a Job is."""
        remember(self._gone, pod.uid, None, _REMEMBERED)
        self._lose_pod(pod)

    def _lose_pod(self, pod: Pod) -> None:
        """Its last words stay until its conversion has ended: a stage may be done, and nobody else knows it."""
        key = self._keys.get(pod.owner)
        if pod.over and key and is_of(pod, *key) and self.conversions[key].phase not in TERMINAL:
            remember(self._departed.setdefault(pod.owner, {}), pod.uid, replace(pod, gone=True), _REMEMBERED)
        self.live.pop(pod.uid, None)
        self._drop(self._pods, pod)

    def keep_pods(self, namespace: str, uids: Iterable[str]) -> None:
        """After a new list: every other pod of that namespace (empty: of all) is gone."""
        kept = frozenset(uids)
        held = [pod for pods in self._pods.values() for pod in pods.values()]
        for pod in held:
            if pod.uid not in kept and namespace in {"", pod.namespace}:
                self._lose_pod(pod)

    def keep_jobs(self, namespace: str, uids: Iterable[str]) -> None:
        """As ``keep_pods``, of Jobs."""
        kept = frozenset(uids)
        held = [job for jobs in self._jobs.values() for job in jobs.values()]
        for job in held:
            if job.uid not in kept and namespace in {"", job.namespace}:
                self._drop(self._jobs, job)

    def jobs(self, key: Key, uid: str) -> tuple[Job, ...]:
        """The Jobs of a conversion."""
        return tuple(job for job in self._jobs.get(uid, {}).values() if is_of(job, *key))

    def pods(self, key: Key, uid: str) -> tuple[Pod, ...]:
        """The pods of a conversion, those that are gone included if they had ended."""
        held = (*self._pods.get(uid, {}).values(), *self._departed.get(uid, {}).values())
        return tuple(pod for pod in held if is_of(pod, *key))

    def _drop(self, kind: dict[str, dict[str, Job]] | dict[str, dict[str, Pod]], thing: Job | Pod) -> None:
        objects = kind.get(thing.owner, {})
        known = objects.pop(thing.uid, None)
        if known is None:
            return
        if not objects:
            del kind[thing.owner]
        self._tell(known)

    def _tell(self, thing: Job | Pod) -> bool:
        """Wake the conversion that it belongs to; whether there is one."""
        key = self._keys.get(thing.owner)
        known = key is not None and is_of(thing, *key)
        if key is not None and known:
            self._changed(key)
        return known
