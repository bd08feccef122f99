"""JSON that others wrote, parsed within bounds: memory for its size, no number without end, no name twice.

Pure: bytes in, values out.  Every fault is a ``ValueError`` with a sentence.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn, cast

_FREE_MEMBERS = 300_000
_NBYTES_PER_MEMBER = 10
"""Bytes of a file for each bracket and comma, in files of the kinds that are read here: a row of empty lists has 1.5."""


def parse_json(data: bytes, *, first: bool = False) -> object:
    """The value of a document.  ``first`` takes the first one: who rewrites a file without truncating it leaves a tail."""
    members = sum(map(data.count, (b",", b"[", b"{")))
    if members > _FREE_MEMBERS + len(data) // _NBYTES_PER_MEMBER:
        raise ValueError(f"{members} members are more than {len(data)} bytes can hold of anything that is known here")
    try:
        decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)
        # A tail that was cut within a character is no fault of the document in front of it.
        text = data.decode(errors="replace" if first else "strict").lstrip()
        return cast("object", decoder.raw_decode(text)[0] if first else decoder.decode(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice[:100]!r} appears twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
