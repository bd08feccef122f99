"""The fields of protobuf messages, seen through a small window of a checkpoint file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckpt2pt.errors import FormatError
from ckpt2pt.io.inputs import InputFile

# mindspore 2.10.0 renames into place and then sets mode 0400 (serialization.py, _exec_save).
COPY_AGAIN = (
    "the file is incomplete or damaged: wait until training has written it (it then has mode 0400), or copy it again"
)

_SKIM_BYTES, _WINDOW_BYTES = 1 << 12, 1 << 16
_BYTES_WIRE, _FIXED_WIRES = 2, {1: 8, 5: 4}  # and 0, a varint
_VARINT_BYTES = 10
_HEAD_BYTES = 2 * _VARINT_BYTES  # a key and a length
_MAX_PACKED_BYTES = 64 * _VARINT_BYTES
_MAX_UNKNOWN_FIELDS = 100_000


class Window:
    """The fields of a protobuf message, seen through a few KiB of the file.

    The window moves forward on demand: small after a jump over payload, growing while messages are small.
    """

    __slots__ = ("_data", "_file", "_last", "_reach", "_start", "_unknown")

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._data = b""
        self._start, self._last, self._reach = 0, -1, _SKIM_BYTES
        self._unknown = 0

    def fields(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (key, first, end) of each field of the message in ``[start, stop)``.

        ``first`` is the number itself for a varint, else the offset of the content; ``end`` is where the field ends.
        """
        pos = start
        while pos < stop:
            self._reach_for(pos)
            key, at = self._varint(self._data, pos - self._start, pos)
            wire, value = key & 7, 0
            if wire in (0, _BYTES_WIRE):
                value, at = self._varint(self._data, at, pos)
            elif wire not in _FIXED_WIRES:
                raise self.bad(f"wire type {wire}, which no checkpoint uses", pos)
            first = self._start + at
            end = first + (value if wire == _BYTES_WIRE else _FIXED_WIRES.get(wire, 0))
            if end > stop or key < 8:
                raise self._torn(key, pos, end, stop)
            yield key, first if wire else value, end
            pos = end

    def match(self, pattern: re.Pattern[bytes], pos: int) -> tuple[int, re.Match[bytes]] | None:
        """What ``pattern`` finds at ``pos``, and the offset that its positions count from."""
        self._reach_for(pos)
        found = pattern.match(self._data, pos - self._start)
        return found and (self._start, found)

    def take(self, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)``, from the window if they are in it."""
        at = start - self._start
        if at >= 0 and stop <= self._last:
            return self._data[at : stop - self._start]
        return self._file.read(start, stop - start)

    def skip(self, key: int, at: int, known: int) -> None:
        """Step over a field of a number above ``known``; a known number has come in a shape it may not have."""
        if key >> 3 <= known:
            raise self.bad(f"field {key >> 3} has wire type {key & 7} or is there twice", at)
        self._unknown += 1
        if self._unknown > _MAX_UNKNOWN_FIELDS:
            raise self.bad(f"more than {_MAX_UNKNOWN_FIELDS} fields that no checkpoint has", at)

    def packed(self, start: int, stop: int) -> Iterator[int]:
        """The varints that fill ``[start, stop)``."""
        if stop - start > _MAX_PACKED_BYTES:
            raise self.bad(f"{stop - start} bytes of dimensions", start)
        data, at = self.take(start, stop) + bytes(_VARINT_BYTES), 0
        while at < stop - start:
            value, at = self._varint(data, at, start)
            yield value
        if at != stop - start:
            raise self.bad("the list of dimensions ends inside a number", start)

    def bad(self, what: str, at: int) -> FormatError:
        """An error at byte ``at``."""
        return FormatError(what, where=f"{self._file.path}, byte {at}", hint=COPY_AGAIN)

    def _reach_for(self, pos: int) -> None:
        """Have the head of the field at ``pos`` in the window."""
        if self._start <= pos <= self._last:
            return
        jump = pos - self._start - len(self._data)
        self._reach = min(2 * self._reach, _WINDOW_BYTES) if jump < self._reach else _SKIM_BYTES
        reach = min(self._reach, self._file.size - pos)
        self._data = self._file.read(pos, reach)
        self._start, self._last = pos, pos + reach - _HEAD_BYTES
        if pos + reach == self._file.size:
            # Zeros behind the end let a head be decoded without asking at each byte; `fields` sees that it ends too late.
            self._data += bytes(_HEAD_BYTES)
            self._last = self._file.size

    def _varint(self, data: bytes, at: int, pos: int) -> tuple[int, int]:
        value = shift = 0
        for byte in data[at : at + _VARINT_BYTES]:
            value |= (byte & 0x7F) << shift
            shift += 7
            at += 1
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at
        raise self.bad("a number of more than 64 bits", pos)

    def _torn(self, key: int, pos: int, end: int, stop: int) -> FormatError:
        if key < 8:
            return self.bad("field number 0, which does not exist", pos)
        if end > self._file.size:
            return self.bad(
                f"the file is cut short: a field runs to byte {end}, the file ends at byte {self._file.size}", pos
            )
        return self.bad(f"a field runs to byte {end}, beyond its message, which ends at byte {stop}", pos)
