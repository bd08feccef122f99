"""JSON from an API server, decoded one object at a time, whatever its size and depth.

Objects belong to other users.  One of 1.3 MB can become 34 MB of Python objects, so a page of a list is never decoded
as a whole; and one that nests a thousand levels cannot be decoded by ``json`` at all.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import cast

import aiohttp

from ckpt2pt.kube.conversion.schema import Json

MAX_OBJECT = 16 << 20
"""Bytes of one object: etcd stores 1.5 MiB, and JSON may need six bytes for one of them."""
LARGE = 64 << 10
"""Bytes of an object from which on it takes so long that others are let go first."""
_MAX_REST = 1 << 20
"""Bytes of a page without its items."""
_MAX_DEPTH = 100
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_FLAT = r'(?:[{\[](?:[^"{}\[\]]++|' + _STRING + r'")*+[}\]][^"{}\[\]]*+){16,}'
_TOKEN = re.compile(_FLAT + "|" + _STRING + r'("|\\?\Z)|[{}\[\]]', re.DOTALL)
"""A run of small containers, which changes nothing and has no object of ours in it; a string; or one bracket."""
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


def decode(data: bytes) -> Json:
    """One object; where it nests too deeply for ``json``, what is below 100 levels is null.  ValueError if it is none."""
    try:
        found: object = json.loads(data)
    except RecursionError:
        found = json.loads(_cut(data.decode()))
    return _object(found)


def _object(found: object) -> Json:
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return cast("Json", found)


def _brackets(text: str, at: int) -> Iterator[tuple[int, int, str]]:
    """Place, depth and the string before it, of each bracket from ``at`` on; ends where a string is not whole."""
    depth, last = 0, ""
    for match in _TOKEN.finditer(text, at):
        token = text[match.start()]
        if token == '"':
            if match[1] != '"':
                return
            last = match[0]
        elif match.end() == match.start() + 1:
            depth += 1 if token in "{[" else -1
            yield match.start(), depth, last


def _cut(text: str) -> str:
    kept, begun, deep = list[str](), 0, False
    for place, depth, _ in _brackets(text, 0):
        if depth > _MAX_DEPTH and not deep:
            kept += [text[begun:place], "null"]
        elif depth == _MAX_DEPTH and deep:
            begun = place + 1
        deep = depth > _MAX_DEPTH
    return "".join(kept) + text[begun:]


class Page:
    """A list as it arrives: ``items`` gives each item, ``rest`` is the list without them.

    ``json`` itself finds where an item ends, which is several times as fast as to look for it; what is not complete is
    tried again when there is twice as much, so that a large item is not read again with each piece of it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._enough = "", 0, 0
        self._frame, self._over = "", False

    async def items(self, content: aiohttp.StreamReader) -> AsyncIterator[Json]:
        """Each item; ValueError where an item, or all that is not one, is larger than it can be."""
        async for data in content.iter_any():
            for item, nbytes in self.feed(data):
                yield item
                if nbytes > LARGE:
                    await asyncio.sleep(0)
        for item, _ in self.feed(b"", last=True):
            yield item

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[tuple[Json, int]]:
        """Take the next bytes; the items that are complete with them, and how long each is."""
        self._text = self._text[self._at :] + self._decoder.decode(data, last)
        self._at, self._enough = 0, 0 if last else self._enough
        if not self._frame:
            self._begin()
        while self._frame and not self._over and (found := self._item()):
            yield found
        if len(self._text) - self._at > (MAX_OBJECT if self._frame and not self._over else _MAX_REST):
            raise ValueError(f"an object of more than {MAX_OBJECT} bytes")

    def rest(self) -> bytes:
        """The list without its items, once it is complete."""
        return (self._frame + self._text[self._at :]).encode()

    def _begin(self) -> None:
        for place, depth, key in _brackets(self._text, 0):
            if depth == 2 and key == '"items"' and self._text[place] == "[":
                self._frame, self._at = self._text[: place + 1], place + 1
                return

    def _item(self) -> tuple[Json, int] | None:
        """The next one; None where it is not complete, or there is none."""
        at = cast("re.Match[str]", _BETWEEN.match(self._text, self._at)).end()
        self._over = self._text.startswith("]", at)
        if self._over or len(self._text) - at <= self._enough:
            return None
        found, end = self._decode(at)
        self._enough = 0 if end else 2 * (len(self._text) - at)
        if not end:
            return None
        self._at = end
        return _object(found), end - at

    def _decode(self, at: int) -> tuple[object, int]:
        """What begins there, and where it ends; 0 where it is not complete."""
        try:
            return _DECODER.raw_decode(self._text, at)
        except RecursionError:
            end = next((place + 1 for place, depth, _ in _brackets(self._text, at) if not depth), 0)
            return (json.loads(_cut(self._text[at:end])) if end else None), end
        except ValueError:
            return None, 0


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
