"""Source files on their way into memory: what the page cache holds from there, the rest past it.

    page cache --preadv--------------------------------------------------> the engine's block
    disk --O_DIRECT, in a thread, while the engine is at the last window--> window --copy--> the engine's block

A read past the page cache spares its allocation and leaves the memory to others, and the disk need not wait for us: the
moves tell which windows will be wanted.  What lies in the cache already is not read from the disk again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from ckpt2pt.core.extents import Extent
from ckpt2pt.engine.blocks import ALIGNMENT, DIRECT_REFUSED, open_direct
from ckpt2pt.io.access import access_error, ended
from ckpt2pt.io.files import OpenFiles, read_at, read_once

WINDOW_BYTES = 1 << 20
WINDOWS = 3  # the one in use, and those being read
_SAMPLES = 64

_Window = tuple[str, int]
"""Path, and number of the window in the file."""


class Sources:
    """The files of one rank; read in the order in which ``extents`` name them.  However many there are, few are open at once."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        extents = [extent for extent in extents if extent.nbytes]
        self._known: set[str] = set()
        self._direct: set[str] = set()  # those of them that are read past the page cache
        with ExitStack() as stack:
            self._files = stack.enter_context(OpenFiles(self._open))
            for path in dict.fromkeys(extent.path for extent in extents):
                self._files.get(path)
            self._reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
            self._stack = stack.pop_all()
        self._wanted = self._windows(extents)
        memory = memoryview(mmap.mmap(-1, WINDOWS * WINDOW_BYTES))
        self._free = [memory[start : start + WINDOW_BYTES] for start in range(0, len(memory), WINDOW_BYTES)]
        self._coming: deque[tuple[_Window, memoryview, Future[int]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, path: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``offset`` of a file on."""
        if path not in self._direct:
            read_at(self._get(path)[0], into, offset, path)
            return
        while into:
            number, start = divmod(offset, WINDOW_BYTES)
            data = self._window((path, number))[start : start + len(into)]
            if not data:
                raise ended(path, offset)
            into[: len(data)] = data
            into, offset = into[len(data) :], offset + len(data)

    def read_anywhere(self, path: str, offset: int, into: memoryview) -> None:
        """The same through the page cache, for reads that no extent announced: the kernel reads ahead in each file."""
        read_at(self._get(path)[0], into, offset, path)

    def _open(self, path: str) -> tuple[int, ...]:
        """A descriptor, and for direct reads a second one if the file was not in the page cache when it was first opened."""
        with ExitStack() as stack:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            first = path not in self._known
            direct = None
            if path in self._direct or (first and not is_cached(fd)):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                direct = open_direct(Path(path), os.O_RDONLY)
            self._known.add(path)
            if first and direct is not None:
                self._direct.add(path)
            stack.pop_all()
            return (fd,) if direct is None else (fd, direct)

    def _get(self, path: str) -> tuple[int, ...]:
        """Descriptors of a path; those that the thread reads from stay open."""
        return self._files.get(path, {path for (path, _), _, _ in self._coming})

    def _windows(self, extents: Iterable[Extent]) -> Iterator[_Window]:
        last = None
        for path, offset, nbytes in extents:
            if path in self._direct:
                for number in range(offset // WINDOW_BYTES, (offset + nbytes - 1) // WINDOW_BYTES + 1):
                    if (path, number) != last:
                        last = (path, number)
                        yield last

    def _window(self, window: _Window) -> memoryview:
        """The bytes of a window; the ones before it are not wanted any more."""
        while True:
            while self._free and (following := next(self._wanted, None)):
                view = self._free.pop()
                # Memory is touched when it is first read into, threads start with their first work.
                future = self._reader.submit(_fill, self._get(following[0]), following, view)
                self._coming.append((following, view, future))
            found, view, future = self._coming[0]
            if found == window:
                return view[: future.result()]
            future.result()
            self._coming.popleft()
            self._free.append(view)


def _fill(fds: tuple[int, ...], window: _Window, view: memoryview) -> int:
    """Read a window with the direct descriptor, the last; behind a short read, and where it is refused, with the first."""
    path, number = window
    fd, done = fds[-1], 0
    while done < len(view):
        if done % ALIGNMENT:
            fd = fds[0]  # behind a short read, which the end of the file is as well
        try:
            count = read_once(fd, view[done:], number * WINDOW_BYTES + done)
        except OSError as error:
            if error.errno not in DIRECT_REFUSED or fd == fds[0]:
                raise access_error(error, path, "reading", reading=True) from error
            fd = fds[0]  # the device wants other sizes
            continue
        if not count:
            break
        done += count
    return done


def drop_from_cache(path: Path) -> int:
    """Have a file read from the disk by whoever reads it next; returns its size.  An ``OSError`` passes through."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def is_cached(fd: int) -> bool:
    """Whether the page cache holds most of a file; True also where Linux does not tell (mincore(2)).

    It tells the owner of a file, who may write it, and root.
    """
    size = os.fstat(fd).st_size
    if not size:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        return True
    resident, page = 0, ctypes.c_ubyte()
    try:
        for sample in range(_SAMPLES):
            place = size * sample // _SAMPLES // mmap.PAGESIZE * mmap.PAGESIZE
            if libc.mincore(ctypes.c_void_p(address + place), ctypes.c_size_t(1), ctypes.byref(page)):
                return True
            resident += page.value & 1
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return 2 * resident >= _SAMPLES
