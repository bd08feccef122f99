"""Files by descriptor: reads and writes that are complete, room that is reserved, and a budget of open files.

No other module reads or writes through a descriptor: the kernel may do less than it was asked for, or be busy.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from ckpt2pt.io.access import UNSUPPORTED, access_error, ended

_P = ParamSpec("_P")
_T = TypeVar("_T")


SLICE_BYTES = 1 << 30
"""Room is reserved in slices of this size: a signal is noticed between two of them."""

_BUSY_SECONDS = 5.0
_PIECE_BYTES = 1 << 20
_OPEN_PATHS = 64
_OTHER_FILES = 32  # standard streams, locks, pipes to workers, the files that are written


# --------------------------------------------------------------------------------------------------- reading and writing


def read_once(fd: int, into: memoryview, offset: int) -> int:
    """One preadv; 0 at the end of the file.  An ``OSError`` passes through."""
    return _patiently(os.preadv, fd, [into], offset)


def read_bytes(fd: int, nbytes: int, offset: int) -> bytes:
    """One pread of at most ``nbytes``; nothing at the end of the file.  An ``OSError`` passes through."""
    return _patiently(os.pread, fd, nbytes, offset)


def read_all(file: Path | int, limit: int = sys.maxsize) -> bytes:
    """A small file, a pipe or what is left of a descriptor, up to ``limit`` bytes.  An ``OSError`` passes through.

    A buffered read of Python's gives None where the file system is busy.
    """
    fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = bytearray()
        while piece := _patiently(os.read, fd, min(limit - len(found), _PIECE_BYTES)):
            found += piece
        return bytes(found)
    finally:
        if fd is not file:
            os.close(fd)


def read_text(path: Path) -> str:
    """A small text file in UTF-8, with any line ends.  An ``OSError`` passes through."""
    return io.TextIOWrapper(io.BytesIO(read_all(path)), encoding="utf-8").read()


def read_at(fd: int, into: memoryview, offset: int, path: str | Path) -> None:
    """Fill ``into`` from byte ``offset`` on; the kernel may give less at a time."""
    while into:
        try:
            count = read_once(fd, into, offset)
        except OSError as error:
            raise access_error(error, path, "reading", reading=True) from error
        if not count:
            raise ended(path, offset)
        into, offset = into[count:], offset + count


def write_once(fd: int, data: memoryview, offset: int) -> int:
    """One pwrite of at least one byte.  An ``OSError`` passes through."""
    count = _patiently(os.pwrite, fd, data, offset)
    if not count:
        raise OSError(errno.EIO, "the file system took no byte and gave no reason")
    return count


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write ``data`` at byte ``offset``; the kernel may take less at a time.  An ``OSError`` passes through."""
    while data:
        count = write_once(fd, data, offset)
        data, offset = data[count:], offset + count


def write_at(fd: int, data: memoryview, offset: int, path: str | Path) -> None:
    """The same for a file whose ``path`` is known."""
    try:
        write_all(fd, data, offset)
    except OSError as error:
        raise access_error(error, path, "writing") from error


def _patiently(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Ask a file system again that is busy (EAGAIN, which some network file systems answer), for a few seconds."""
    until, pause = time.monotonic() + _BUSY_SECONDS, 0.001
    while True:
        try:
            return call(*args, **kwargs)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def reserve(fd: int, nbytes: int, check: Callable[[], object] = lambda: None) -> None:
    """Reserve the room of a file where the file system can; give the file its size where it can do at least that.

    ``check`` is called before each slice, and may raise.  An ``OSError`` passes through.  fallocate(2) itself: where it is
    missing, glibc's posix_fallocate writes a byte into every block, which is slow and cannot be interrupted.
    """
    start, refused = 0, UNSUPPORTED | {errno.EINVAL, errno.EPERM}
    while start < nbytes:
        check()
        size = min(SLICE_BYTES, nbytes - start)
        number = fallocate(fd, start, size)
        if number in refused:
            break
        if not number:
            start += size
        elif number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    else:
        return
    try:
        os.ftruncate(fd, nbytes)
    except OSError as error:
        if error.errno not in refused:
            raise


def fallocate(fd: int, offset: int, nbytes: int) -> int:
    """fallocate(2); the error number, 0 for success."""
    import ctypes  # noqa: PLC0415 - for those who write

    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) == 0
    return 0 if done else ctypes.get_errno()


def open_to_read(path: str) -> tuple[int]:
    """The descriptor of a file that is read in no special way."""
    return (os.open(path, os.O_RDONLY | os.O_CLOEXEC),)


class OpenFiles:
    """Descriptors by path, opened when they are asked for; those used longest ago are closed to stay within a budget.

    ``opener`` gives all descriptors of a path, or fails with an ``OSError``.
    """

    def __init__(self, opener: Callable[[str], tuple[int, ...]] = open_to_read) -> None:
        self._opener = opener
        self._open: dict[str, tuple[int, ...]] = {}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = _OPEN_PATHS if soft == resource.RLIM_INFINITY else (soft - _OTHER_FILES) // 4
        self._limit = max(2, min(_OPEN_PATHS, allowed))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all of them."""
        with ExitStack() as stack:
            for path in tuple(self._open):
                stack.callback(self._close, path)

    def get(self, path: str, in_use: Collection[str] = ()) -> tuple[int, ...]:
        """The descriptors of a path; those of the paths ``in_use`` stay open."""
        found = self._open.pop(path, None)
        idle = [other for other in self._open if other not in in_use] if found is None else []
        while found is None:
            if len(self._open) >= self._limit and idle:
                self._close(idle.pop(0))
            try:
                found = self._opener(path)
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE} or not idle:
                    raise access_error(error, path, "opening", reading=True) from error
                self._close(idle.pop(0))
        self._open[path] = found
        return found

    def _close(self, path: str) -> None:
        for fd in self._open.pop(path):
            os.close(fd)


def raise_file_limit() -> None:
    """Allow this process, and those it starts, as many open files as its hard limit has (at most 65,536)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
