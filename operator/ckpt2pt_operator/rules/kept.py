"""What the operator keeps of a CheckpointConversion: what its rules read, as packed bytes.  Pure.

A tree of Python objects needs up to 33 times the bytes of its JSON, and a thousand tenants may each bring a megabyte.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from typing import cast

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.fields import Finding, to_error
from ckpt2pt.kube.conversion.report import child, number, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.size import too_large
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND
from ckpt2pt_operator.rules.awaits import awaited
from ckpt2pt_operator.rules.conditions import follows

MAX_PACKED = 16 << 10
"""Bytes of one that is held in memory; a larger one is read again from the API server for each look."""
REFUSED = "refused"
"""Field in the place of ``spec``: the finding for which it is refused unread.  An API server keeps no such field."""
_OURS = "ckpt2pt.dev/"
_MAX_ANNOTATION = 1024
_META = ("namespace", "name", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")

Key = tuple[str, str]
"""Namespace and name of a conversion."""
Name = tuple[str, str, str, str]
"""apiVersion, kind, namespace and name of a training."""


def key_of(raw: Json) -> Key:
    """The key of an object."""
    meta = child(raw, "metadata")
    return text(meta, "namespace"), text(meta, "name")


def slim(raw: Json) -> Json:
    """A CheckpointConversion without what no rule reads; one that is too large has ``REFUSED`` in the place of its spec."""
    meta = child(raw, "metadata")
    kept: Json = {name: meta[name] for name in _META if isinstance(meta.get(name), str | int)}
    ours = {
        name: value[:_MAX_ANNOTATION]
        for name, value in child(meta, "annotations").items()
        if name.startswith(_OURS) and isinstance(value, str)
    }
    found: Json = {"apiVersion": API_VERSION, "kind": KIND, "metadata": kept | ({"annotations": ours} if ours else {})}
    if REFUSED in raw:
        found[REFUSED] = raw[REFUSED]
    elif finding := too_large(raw.get("spec")):
        found[REFUSED] = asdict(finding)
    elif "spec" in raw:
        found["spec"] = raw["spec"]
    return found | ({"status": raw["status"]} if "status" in raw else {})


def refused(document: Json) -> UsageError | None:
    """Why ``slim`` left its spec out, if it did."""
    finding = child(document, REFUSED)
    if not finding:
        return None
    return to_error([Finding(**cast("dict[str, str]", finding))], f"{KIND} {key_of(document)[1]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One conversion; ``phase`` is Following for what runs as long as the training that it follows."""

    uid: str
    version: int
    phase: str
    training: Name | None
    packed: bytes | None

    def document(self) -> Json | None:
        """As ``slim`` had it; None where it is too large to be held in memory."""
        return cast("Json", json.loads(zlib.decompress(self.packed))) if self.packed is not None else None


def keep(raw: Json) -> Kept:
    """Pack a conversion."""
    found = slim(raw)
    meta, status, after = child(found, "metadata"), child(found, "status"), awaited(found)
    phase = text(status, "phase") or "Pending"
    training = (text(after, "apiVersion"), text(after, "kind"), text(meta, "namespace"), text(after, "name"))
    packed = zlib.compress(json.dumps(found, separators=(",", ":")).encode(), 1)
    return Kept(
        uid=text(meta, "uid"),
        version=number(meta, "resourceVersion"),
        phase="Following" if phase == "Running" and follows(status) else phase,
        training=training if after else None,
        packed=packed if len(packed) <= MAX_PACKED else None,
    )
