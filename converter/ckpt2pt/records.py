"""Small documents of ours on a target volume, with a seal: one that was cut, changed or forged by hand is not taken for one.

The seal is the SHA-256 of everything else in the document.  It guards against accidents, not against an attacker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

Json = dict[str, object]
_SEAL = "seal"


def dump(document: Mapping[str, object]) -> bytes:
    """A document as a file holds it."""
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def seal(document: Mapping[str, object]) -> bytes:
    """The same with its seal."""
    return dump({**document, _SEAL: _digest(document)})


def load(data: bytes) -> Json | None:
    """Any JSON object; None where it is none."""
    try:
        document: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("Json", document) if isinstance(document, dict) else None


def unseal(data: bytes) -> Json | None:
    """What :func:`seal` was given; None unless all of it is there, unchanged."""
    document = load(data)
    if document is None:
        return None
    told = document.pop(_SEAL, None)
    return document if told == _digest(document) else None


def _digest(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
