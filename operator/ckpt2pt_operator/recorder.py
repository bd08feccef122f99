"""Write Kubernetes events about an object.  The same event again within a while raises its count."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from ckpt2pt.kube.conversion.job import MANAGER
from ckpt2pt.kube.conversion.report import child, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.api import EVENTS, Api, ApiError
from ckpt2pt_operator.recent import remember
from ckpt2pt_operator.rules.conditions import stamp
from ckpt2pt_operator.rules.kept import key_of
from ckpt2pt_operator.rules.notes import Note

_WINDOW = 600.0
_MOST = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Written:
    name: str
    count: int
    at: float


class Recorder:
    """Events are for people: one that cannot be written is logged, and nothing else."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._written: dict[tuple[str, str, str], _Written] = {}

    async def write(self, about: Json, note: Note) -> None:
        """Write one event about an object; its ``apiVersion`` and ``kind`` have to be there."""
        namespace, name = key_of(about)
        uid = text(child(about, "metadata"), "uid")
        now, when = time.monotonic(), stamp(datetime.now(UTC))
        level = logging.WARNING if note.kind == "Warning" else logging.INFO
        log.log(level, note.message, extra={"about": f"{namespace}/{name}", "reason": note.reason})
        known = self._written.get((uid, note.reason, note.message))
        try:
            if known is not None and now - known.at < _WINDOW:
                known.count, known.at = known.count + 1, now
                await self._api.patch(EVENTS, namespace, known.name, {"count": known.count, "lastTimestamp": when})
                return
            body: Json = {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"generateName": f"{name}.", "namespace": namespace},
                "involvedObject": {
                    "apiVersion": about["apiVersion"], "kind": about["kind"], "namespace": namespace, "name": name, "uid": uid,
                },
                "type": note.kind,
                "reason": note.reason,
                "message": note.message,
                "firstTimestamp": when,
                "lastTimestamp": when,
                "count": 1,
                "source": {"component": MANAGER},
                "reportingComponent": MANAGER,
            }  # fmt: skip
            written = await self._api.create_object(EVENTS, namespace, body)
        except ApiError as error:
            self._written.pop((uid, note.reason, note.message), None)  # it may be the event that is gone
            log.warning("an event could not be written", extra={"error": str(error)})
            return
        seen = _Written(text(child(written, "metadata"), "name"), 1, now)
        remember(self._written, (uid, note.reason, note.message), seen, _MOST)
