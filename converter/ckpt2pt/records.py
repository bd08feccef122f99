"""Small documents of ours on a target volume, with a seal: one that was cut, changed or forged by hand is not taken for one.

The seal is the SHA-256 of everything else in the document.  It guards against accidents, not against an attacker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import indent
from typing import cast

Json = dict[str, object]
_SEAL = "seal"


def dump(document: Mapping[str, object]) -> bytes:
    """A document as a file holds it."""
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def seal(document: Mapping[str, object]) -> bytes:
    """The same with its seal."""
    return dump({**document, _SEAL: _digest(document)})


def seal_joined(document: Mapping[str, object], name: str, items: Iterable[Json]) -> Iterator[bytes]:
    """In pieces, what :func:`seal` makes of ``document`` with the list ``items`` as ``name``; one item at a time is in memory.

    Read, both are the same; here the seal comes last.
    """
    digest, comma = hashlib.sha256(b"{"), ""
    yield b"{"
    for key in sorted({*document, name}):
        digest.update(f"{comma}{json.dumps(key)}: ".encode())
        yield f"{comma.strip()}\n {json.dumps(key)}: ".encode()
        if key == name:
            yield from _joined(items, digest.update)
        else:
            digest.update(_canonical(document[key]))
            yield json.dumps(document[key], sort_keys=True).encode()
        comma = ", "
    digest.update(b"}")
    yield f'{comma.strip()}\n "{_SEAL}": "{digest.hexdigest()}"\n}}\n'.encode()


def _joined(items: Iterable[Json], update: Callable[[bytes], object]) -> Iterator[bytes]:
    """A list, an item at a time; ``update`` gets its canonical form."""
    comma = ""
    update(b"[")
    yield b"["
    for item in items:
        update(comma.encode() + _canonical(item))
        yield f"{comma.strip()}\n{indent(json.dumps(item, indent=1, sort_keys=True), '  ')}".encode()
        comma = ", "
    update(b"]")
    yield b"\n ]"


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
    return hashlib.sha256(_canonical(document)).hexdigest()


def _canonical(value: object) -> bytes:
    """What is summed."""
    return json.dumps(value, sort_keys=True).encode()
