"""Open an input file and read exact stretches of it."""

from __future__ import annotations

import os
import stat
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, cast

from ckpt2pt.errors import FormatError, field_of, ref
from ckpt2pt.io import digests
from ckpt2pt.io.access import access_error, ended
from ckpt2pt.io.checksums import Piece, crc32, crc32_combine
from ckpt2pt.io.files import OpenFiles, read_bytes
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import status

MAX_JSON_BYTES = 256 << 20
MAX_META_BYTES = 1 << 30
_PIECE_BYTES = 1 << 19
_QUOTED = 120


class InputFile:
    """A file open for reading, of a size that is known."""

    __slots__ = ("_borrowed", "_data", "_fd", "_option", "path", "size")

    kind: ClassVar[str] = "checkpoint file"
    """What it should be, for messages."""

    option: ClassVar[str] = ref("source.path")
    """What names it."""

    def __init__(self, path: Path, option: str = "", *, keep: bool = False, among: OpenFiles | None = None) -> None:
        """Open ``path``; with ``keep`` a small file is read once a process, and again only when it was written since.

        ``among`` are files of which this is one: it is opened with them, once, and closed with them.
        """
        self.path, self._option, self._borrowed = str(path), option or self.option, among is not None
        self._fd, self._data = -1, _kept(path) if keep else None
        if self._data is not None:
            self.size = len(self._data)
            return
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            self._fd = among.get(self.path)[0] if among else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with ExitStack() as refused:
                refused.callback(self._close)
                found = os.fstat(self._fd)
                self.size = found.st_size
                if not stat.S_ISREG(found.st_mode):
                    other = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
                    raise FormatError(f"expected a {self.kind}, found {other}", where=path, hint="name the file itself")
                if keep and self.size <= _MAX_KEPT_FILE and time.time() - found.st_ctime >= _AT_REST:
                    self._data = _keep(path, found, self.read(0, self.size))
                refused.pop_all()
        except OSError as error:
            raise access_error(error, path, "opening", option=self._option) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._fd >= 0 and not self._borrowed:
            os.close(self._fd)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from ``offset`` on."""
        data = self._pread(offset, nbytes)
        while len(data) < nbytes:  # a network file system may give less than is there
            data += self._pread(offset + len(data), nbytes - len(data))
        return data

    def crc32(self, start: int, stop: int, value: int = 0, read: Sequence[Piece] = ()) -> int:
        """CRC-32 of the bytes ``[start, stop)``, continuing ``value``; what ``read`` (sorted) tells of is not read again."""
        for first, nbytes, crc in read[bisect_left(read, (start, 0, 0)) : bisect_left(read, (stop, 0, 0))]:
            if start <= first and first + nbytes <= stop:  # once, where two reads overlap
                value = crc32_combine(self.crc32(start, first, value), crc, nbytes)
                start = first + nbytes
        while start < stop:
            piece = self._pread(start, min(_PIECE_BYTES, stop - start))
            value = crc32(piece, value)
            start += len(piece)
        return value

    def _pread(self, offset: int, nbytes: int) -> bytes:
        try:
            data = read_bytes(self._fd, nbytes, offset) if self._data is None else self._data[offset : offset + nbytes]
        except OSError as error:
            raise access_error(error, self.path, "reading", option=self._option) from error
        if not data and nbytes:
            raise ended(self.path, offset)
        return data


def opened(source: Path | InputFile) -> AbstractContextManager[InputFile]:
    """A file to be opened and closed, or one that is open and stays so."""
    return nullcontext(source) if isinstance(source, InputFile) else InputFile(source)


_KEPT: OrderedDict[Path, tuple[tuple[int, ...], bytes]] = OrderedDict()
"""Small files by path, each with what its file system said of it when it was read."""
_MAX_KEPT_FILE, _MAX_KEPT = 128 << 10, 256 << 10
_AT_REST = 2.0
"""Seconds since the last change of a file that is kept: within the grain of a file system's clock the next one is not seen."""


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _kept(path: Path) -> bytes | None:
    """What was read of a file, None unless it is the same still."""
    kept, seen = _KEPT.get(path), status(path) if path in _KEPT else None
    return kept[1] if kept and seen and kept[0] == _identity(seen) else None


def _keep(path: Path, found: os.stat_result, data: bytes) -> bytes:
    _KEPT.pop(path, None)
    _KEPT[path] = _identity(found), data
    while sum(len(kept) for _, kept in _KEPT.values()) > _MAX_KEPT:
        _KEPT.popitem(last=False)
    return data


def sha256(path: Path, option: str) -> str:
    """SHA-256 of a file of metadata, which ``option`` names; one of an absurd size is refused."""
    with InputFile(path, option, keep=True) as file:
        _check_size(file, MAX_META_BYTES, option)
        found = digests.sha256()
        for start in range(0, file.size, _PIECE_BYTES):
            found.update(file.read(start, min(_PIECE_BYTES, file.size - start)))
        return found.hexdigest()


def read_whole(path: Path, option: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """All of a small file, which ``option`` names; a larger one is refused."""
    with InputFile(path, option, keep=True) as file:
        _check_size(file, limit, option)
        return file.read(0, file.size)


def read_object(path: Path, option: str, limit: int, hint: str) -> dict[str, object]:
    """A small file that is one JSON object.  Raises :class:`FormatError` for any other."""
    try:
        document = parse_json(read_whole(path, option, limit))
    except ValueError as error:
        raise FormatError(f"not a JSON document: {str(error)[:200]}", where=path, hint=hint) from error
    if not isinstance(document, dict):
        raise FormatError("not a JSON object", where=path, hint=hint)
    return cast("dict[str, object]", document)


def read_head(path: Path, option: str, limit: int) -> bytes:
    """The first ``limit`` bytes of a file, which ``option`` names, or all of a smaller one."""
    with InputFile(path, option) as file:
        return file.read(0, min(limit, file.size))


def _check_size(file: InputFile, limit: int, option: str) -> None:
    if file.size > limit:
        raise FormatError(
            f"larger than {limit >> 20} MiB", where=file.path, hint=f"check {option}", field=field_of(option)
        )


def quoted(value: str | bytes | int | list[int]) -> str:
    """``value`` for a message: printable, and not longer than a line."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
