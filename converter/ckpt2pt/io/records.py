"""Small documents of ours on a target volume, with a seal: one that was cut, changed or forged by hand is not taken for one.

The seal is the SHA-256 of everything else in the document.  It guards against accidents, not against an attacker.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import indent
from typing import cast

from ckpt2pt.io.digests import sha256
from ckpt2pt.io.jsontext import parse_json

Json = dict[str, object]
_SEAL = "seal"
MAX_RECORD_BYTES = 256 << 20
OVERSIZED = b"\0"
"""Stands for the content of a file that is too large for a document of ours: it is none, and is not read."""


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
    digest, comma = sha256(b"{"), ""
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
        document = parse_json(data)
    except ValueError:
        return None
    return cast("Json", document) if isinstance(document, dict) else None


def unseal(data: bytes) -> Json | None:
    """What :func:`seal` was given; None unless all of it is there, unchanged, and of the form that a record has."""
    document = load(data)
    if document is None:
        return None
    sealed = document.pop(_SEAL, None)
    return document if sealed == _digest(document) and _is_record(document) else None


# ---------------------------------------------------------------------------------------------------- form of a record


def _is_record(document: Mapping[str, object]) -> bool:
    """Whether every field that is read has its type: claim, rank, stage, report and combined rank alike.

    A seal says that nothing was cut; anybody can make one.
    """
    if ("tp" in document or "pp" in document) and not document.keys() >= _RANK_FIELDS:
        return False
    return all(check(document[name]) for name, check in _FIELDS.items() if name in document)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(limit: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value < limit


def _is_file(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    file = cast("Json", value)
    size = _is_count(1 << 63)(file.get("nbytes"))
    return size and _is_place(file.get("path")) and bool(_CRC32.fullmatch(str(file.get("crc32"))))


def _is_place(value: object) -> bool:
    """Whether ``value`` is a path below a folder that the file system can be asked for."""
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in value.split("/") or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_list(check: Callable[[Json], bool]) -> Callable[[object], bool]:
    def is_list(value: object) -> bool:
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        return all(isinstance(item, dict) and check(cast("Json", item)) for item in items)

    return is_list


def _is_mapping(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, cast("Json", value).values()))


def _is_texts(value: object, check: Callable[[object], bool] = _is_text) -> bool:
    return isinstance(value, list) and all(map(check, cast("list[object]", value)))


def _is_swap(value: object) -> bool:
    """What a claim says of files that are about to be moved (publish/swap.py): all of it stays below the folder."""
    swap = cast("Json", value) if isinstance(value, dict) else {}
    places = all(_is_texts(swap.get(name), _is_place) for name in ("records", "coming"))
    return places and _is_place(swap.get("from")) and _is_list(_is_file)(swap.get("files"))


_CRC32 = re.compile("[0-9a-f]{8}")
_RANK_FIELDS = {"identity", "tp", "pp", "files"}
_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "identity": _is_text,
    "purpose": _is_text,
    "tp": _is_count(1 << 16),
    "pp": _is_count(1 << 16),
    "iteration": _is_count(10**18),
    "files": _is_list(_is_file),
    "tensors": _is_mapping(_is_text),
    "sourceChecksums": _is_mapping(_is_count(1 << 63)),
    "verified": _is_text,
    "warnings": _is_texts,
    "swap": _is_swap,
    "ranks": lambda value: value is None or _is_list(_is_record)(value),
    "stages": _is_list(_is_record),
}


def _digest(document: Mapping[str, object]) -> str:
    return sha256(_canonical(document)).hexdigest()


def _canonical(value: object) -> bytes:
    """What is summed."""
    return json.dumps(value, sort_keys=True).encode()
