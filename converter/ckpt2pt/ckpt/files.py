"""Read a checkpoint file: exact stretches of it, or the fields of protobuf messages through a small window.

What the operating system refuses becomes an error with a mend.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ckpt2pt.checksums import crc32
from ckpt2pt.errors import Ckpt2ptError, FileAccessError, FormatError, MissingInputError

# mindspore 2.10.0 renames into place and then sets mode 0400 (serialization.py, _exec_save).
COPY_AGAIN = (
    "the file is incomplete or damaged: wait until training has written it (it then has mode 0400), or copy it again"
)

_PIECE_BYTES = 1 << 19
_QUOTED = 120

_SKIM_BYTES, _WINDOW_BYTES = 1 << 12, 1 << 16
_BYTES_WIRE, _FIXED_WIRES = 2, {1: 8, 5: 4}  # and 0, a varint
_VARINT_BYTES = 10
_HEAD_BYTES = 2 * _VARINT_BYTES  # a key and a length
_MAX_PACKED_BYTES = 64 * _VARINT_BYTES
_MAX_UNKNOWN_FIELDS = 100_000


class InputFile:
    """A file open for reading, of a size that is known."""

    __slots__ = ("_fd", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise refused(error, path) from error
        found = os.fstat(self._fd)
        self.size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise FormatError(f"expected a checkpoint file, found {kind}", where=path, mend="name the file itself")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from ``offset`` on."""
        data = self._pread(offset, nbytes)
        while len(data) < nbytes:  # a network file system may give less than is there
            data += self._pread(offset + len(data), nbytes - len(data))
        return data

    def crc32(self, start: int, stop: int, value: int = 0) -> int:
        """CRC-32 of the bytes ``[start, stop)``, continuing ``value``."""
        while start < stop:
            piece = self._pread(start, min(_PIECE_BYTES, stop - start))
            value = crc32(piece, value)
            start += len(piece)
        return value

    def _pread(self, offset: int, nbytes: int) -> bytes:
        try:
            data = os.pread(self._fd, nbytes, offset)
        except OSError as error:
            raise refused(error, Path(self.path)) from error
        if not data and nbytes:
            raise FileAccessError(
                f"the file became shorter while it was read: nothing at byte {offset} of {self.size}",
                where=self.path,
                mend="convert only checkpoints whose writing has ended; then run the command again",
            )
        return data


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
        return FormatError(what, where=f"{self._file.path}, byte {at}", mend=COPY_AGAIN)

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


def refused(error: OSError, path: Path) -> Ckpt2ptError:
    """What opening or reading ``path`` came to, in the user's words."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingInputError("the file is not there", where=path, mend="check spec.source.path (--ms-path)")
    if isinstance(error, PermissionError):
        return _denied(path)
    return FileAccessError(
        f"reading failed: {error.strerror or error}",
        where=path,
        mend="check that the volume is mounted and healthy, then run the command again",
    )


def quoted(value: str | bytes | int | list[int]) -> str:
    """``value`` for a message: printable, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _denied(path: Path) -> FileAccessError:
    place, found = _barrier(path)
    kind, allow = ("folder", "a+rx") if stat.S_ISDIR(found.st_mode) else ("file", "a+r")
    return FileAccessError(
        f"permission denied: the {kind} {place.name or place} belongs to uid {found.st_uid}, gid {found.st_gid} "
        f"and has mode {stat.S_IMODE(found.st_mode):04o}; this process runs as uid {os.geteuid()}, gid {os.getegid()} "
        "(MindSpore leaves its checkpoints at mode 0400)",
        where=path,
        mend=f"run as uid {found.st_uid} (runAsUser of the pod), or let the owner `chmod {allow} {place}`",
    )


def _barrier(path: Path) -> tuple[Path, os.stat_result]:
    """What is closed to us: the file, or the folder above it that may not be searched."""
    place = path.absolute()
    while True:
        try:
            return place, place.stat()
        except OSError:
            if place == place.parent:
                raise
            place = place.parent
