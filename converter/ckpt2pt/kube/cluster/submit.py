"""Create a CheckpointConversion exactly once, and follow it to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from ckpt2pt.errors import NOT_THE_SPEC, MissingInputError, TryAgainError, UsageError
from ckpt2pt.kube.cluster.api import CONVERSIONS, Api, ApiError, Json, explained
from ckpt2pt.kube.conversion.names import request_path
from ckpt2pt.kube.conversion.status import REASONS, TERMINAL, WORST_FIRST

log = logging.getLogger("ckpt2pt")

POLL_SECONDS = 2.0
_CODES = {reason: code for code, reason in REASONS.items()} | {
    "InvalidSpec": 64, "NotAllowed": 64, "NameConflict": 64, "NoReport": 70, "TrainingFailed": 66, "TrainingDeleted": 66,
    **dict.fromkeys(NOT_THE_SPEC, 64),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What is there now; ``created`` is false when it was there already."""

    namespace: str
    name: str
    created: bool

    @property
    def path(self) -> str:
        """Of the object."""
        base, plural = CONVERSIONS
        return request_path(base, self.namespace, plural, self.name)

    def document(self) -> Json:
        """For ``--output json``."""
        return {"namespace": self.namespace, "name": self.name, "created": self.created}


def submit(api: Api, document: Json) -> Submitted:
    """Create it.  One of the same name that asks for the same is as good; one that asks for something else is refused."""
    metadata = cast("Json", document["metadata"])
    namespace = str(metadata.get("namespace") or api.connection.namespace)
    found = Submitted(namespace=namespace, name=str(metadata.get("name", "")), created=True)
    where = f"CheckpointConversion {namespace}/{found.name}"
    try:
        base, plural = CONVERSIONS
        api.json("POST", request_path(base, namespace, plural), document, fieldValidation="Strict")
    except ApiError as error:
        if error.status != 409:
            raise explained(error, "creating it", where) from error
        _same(api, found, document, where)
        return Submitted(namespace=namespace, name=found.name, created=False)
    return found


def _same(api: Api, there: Submitted, document: Json, where: str) -> None:
    """Compare with what is there, where this account may look at it."""
    try:
        other = api.json("GET", there.path)
    except ApiError as error:
        log.info("%s is there already; this account may not see what it asks for (%d)", where, error.status)
        return
    if not _within(document.get("spec"), other.get("spec")):
        raise UsageError(
            "already exists with a different spec",
            where=where,
            hint="give another --name, or --epoch and --step, from which a name is made; or delete it",
        )


def _within(ours: object, theirs: object) -> bool:
    """Whether everything we ask for is asked for there; defaults may be there besides."""
    if isinstance(ours, Mapping):
        fields = cast("Json", theirs) if isinstance(theirs, dict) else {}
        return isinstance(theirs, dict) and all(
            _within(value, fields.get(name))
            for name, value in cast("Mapping[str, object]", ours).items()
            if value is not None
        )
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = zip(cast("list[object]", ours), cast("list[object]", theirs), strict=False)
        return len(cast("list[object]", ours)) == len(cast("list[object]", theirs)) and all(
            _within(a, b) for a, b in pairs
        )
    return ours == theirs


def follow(api: Api, there: Submitted, tell: Callable[[Json], None], *, seconds: float | None = None) -> Json:
    """Look until it has ended; ``tell`` is called with every status that differs from the one before.  Returns the object."""
    end = None if seconds is None else time.monotonic() + seconds
    where = f"CheckpointConversion {there.namespace}/{there.name}"
    last: object = None
    while True:
        try:
            seen = api.json("GET", there.path)
        except ApiError as error:
            if error.status == 404 and (there.created or last is not None):
                hint = "submit it again: what is finished is kept"
                raise MissingInputError("it was deleted before it had ended", where=where, hint=hint) from error
            raise explained(error, "reading it", where) from error
        status = cast("Json", seen.get("status") or {})
        if status != last:
            tell(status)
            last = status
        if status.get("phase") in TERMINAL:
            return seen
        if end is not None and time.monotonic() > end:
            what = f"it has not ended within {seconds:g} s ({status.get('phase', 'no operator has looked at it yet')})"
            raise TryAgainError(what, where=where, hint="look again with ckpt2pt submit --wait; it goes on by itself")
        time.sleep(POLL_SECONDS)


def code_of(status: Mapping[str, object]) -> int:
    """The exit code of a conversion that has ended: what ``ckpt2pt convert`` would have ended with."""
    if status.get("phase") in {"Succeeded", "Planned"}:
        return 0
    stages = cast("list[Json]", status.get("stageStatuses") or [])
    reasons = [str(stage.get("reason")) for stage in stages if stage.get("state") == "Failed"]
    reasons = reasons or [
        str(c.get("reason")) for c in cast("list[Json]", status.get("conditions") or []) if c.get("type") == "Failed"
    ]
    # A kill, a deadline, a cancellation: nothing says that it cannot succeed.
    codes = {_CODES.get(reason, 75) for reason in reasons} or {75}
    return next(code for code in WORST_FIRST if code in codes)


def sentence(status: Mapping[str, object]) -> str:
    """``Running: 37%, 1/4 stages; stage 3 is being converted``."""
    conditions = cast("list[Json]", status.get("conditions") or [])
    ready = next((str(each.get("message", "")) for each in conditions if each.get("type") == "Ready"), "")
    parts = [
        str(status[field]) + unit for field, unit in (("progress", ""), ("stageSummary", " stages")) if field in status
    ]
    return f"{status.get('phase', 'Pending')}: {', '.join(parts) or 'not begun'}{f'; {ready}' if ready else ''}"
