"""JSON from an API server, decoded one object at a time, whatever its size and depth.

Objects belong to other users.  One of 1.3 MB can become 34 MB of Python objects, so a page of a list is never decoded
as a whole; and one that nests a thousand levels cannot be decoded by ``json`` at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import cast

import aiohttp

from ckpt2pt.conversion.spec import Json

MAX_OBJECT = 16 << 20
"""Bytes of one object: etcd stores 1.5 MiB, and JSON may need six bytes for one of them."""
LARGE = 64 << 10
"""Bytes of an object from which on it takes so long that others are let go first."""
_MAX_REST = 1 << 20
"""Bytes of a page without its items."""
_MAX_DEPTH = 100
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_FLAT = rb'(?:[{\[](?:[^"{}\[\]]++|' + _STRING + rb'")*+[}\]][^"{}\[\]]*+){16,}'
_TOKEN = re.compile(_FLAT + rb"|" + _STRING + rb'("|\\?\Z)|[{}\[\]]', re.DOTALL)
"""A run of small containers, which changes nothing and has no object of ours in it; a string; or one bracket."""
_ITEMS = b'"items"'
_QUOTE, _OPEN = ord('"'), frozenset(b"{[")


def decode(data: bytes) -> Json:
    """One object; where it nests too deeply for ``json``, what is below 100 levels is null.  ValueError if it is none."""
    try:
        found: object = json.loads(data)
    except RecursionError:
        found = json.loads(_cut(data))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return cast("Json", found)


def _cut(data: bytes) -> bytes:
    depth, kept, begun = 0, bytearray(), 0
    for match in _TOKEN.finditer(data):
        token = data[match.start()]
        if token == _QUOTE or match.end() > match.start() + 1:
            continue
        if token in _OPEN:
            depth += 1
            if depth == _MAX_DEPTH + 1:
                kept += data[begun : match.start()]
                kept += b"null"
        else:
            if depth == _MAX_DEPTH + 1:
                begun = match.end()
            depth -= 1
    return bytes(kept + data[begun:])


class Page:
    """A list as it arrives: ``feed`` gives the bytes of each item that is complete, ``rest`` is the list without them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at, self._depth, self._begun = 0, 0, 0
        self._in_items, self._last = False, b""
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take the next bytes.  ValueError where an item, or all that is not one, is larger than it can be."""
        self._buffer += data
        found = list(self._scan(bytes(self._buffer)))
        del self._buffer[: self._begun]
        self._at -= self._begun
        self._begun = 0
        if len(self._buffer) > MAX_OBJECT or len(self._rest) > _MAX_REST:
            raise ValueError(f"an object of more than {MAX_OBJECT} bytes")
        return iter(found)

    def rest(self) -> bytes:
        """The list without its items, once it is complete."""
        return bytes(self._rest + self._buffer)

    def _scan(self, data: bytes) -> Iterator[bytes]:
        for match in _TOKEN.finditer(data, self._at):
            token = data[match.start()]
            if token == _QUOTE:
                if match[1] != b'"':
                    self._at = match.start()  # the string goes on in the next bytes
                    return
                if self._depth == 1:
                    self._last = match[0]
            elif match.end() == match.start() + 1:
                if token in _OPEN:
                    self._open(data, match.start())
                elif self._close(match.start()):
                    yield data[self._begun : match.end()]
                    self._begun = match.end()
        self._at = len(data)

    def _open(self, data: bytes, at: int) -> None:
        self._depth += 1
        if self._in_items and self._depth == 3:
            self._begun = at
        elif self._depth == 2 and self._last == _ITEMS:
            self._in_items = True
            self._rest += data[self._begun : at + 1]

    def _close(self, at: int) -> bool:
        """Whether it ends an item."""
        self._depth -= 1
        if self._in_items and self._depth == 1:
            self._in_items, self._last, self._begun = False, b"", at
        return self._in_items and self._depth == 2


async def lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to ``MAX_OBJECT``: aiohttp's own end at 128 KiB, and a large object would end every watch."""
    rest = bytearray()
    async for data in content.iter_any():
        *whole, last = data.split(b"\n")
        for line in whole:
            rest += line
            if rest:
                yield bytes(rest)
            rest.clear()
        rest += last
        if len(rest) > MAX_OBJECT:
            raise ValueError(f"a line of more than {MAX_OBJECT} bytes")
    if rest:
        raise ValueError("the last line is not whole")
