"""Blocks of memory on their way into files: large ones past the page cache, in threads of their own.

    take() --the engine reads or converts into it--> write(file, offset, block) --> free again when it is on the disk

    file    |..head..|============ body =============|..tail..|     page boundaries
            buffered   direct (O_DIRECT), while the           buffered
                       engine fills the next block

A direct write spares the copy into the page cache, its allocation and its writeback, and leaves the memory to others;
one at a time it would wait for the disk, so two are under way.  Pages written directly and buffered are never the same.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ckpt2pt.io.access import UNSUPPORTED, access_error
from ckpt2pt.io.files import write_at, write_once
from ckpt2pt.io.volume import file_system

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Offset, size and memory address of a direct write are multiples of this."""

WRITERS = 2
SPARE_BLOCKS = 2  # one being read, one being converted into
_SMALL_BYTES = 64 << 10  # less is not worth a thread
DIRECT_REFUSED = UNSUPPORTED | {errno.EINVAL}
"""What a file system or device answers that takes no direct reads or writes, or wants other sizes."""
_DIRECT_SYSTEMS = frozenset({"ext4", "xfs"})
"""Where direct writes were measured or are known to be sound; over a network each one would wait for a round trip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file open for writing; ``direct`` is a second descriptor of it, without page cache, where there can be one."""

    path: Path
    fd: int
    direct: int | None

    def origin(self, offset: int) -> int:
        """Where in a block the bytes for ``offset`` must begin, so that pages of both lie on each other."""
        return 0 if self.direct is None else offset % ALIGNMENT


Finished = Callable[[OutputFile, int, int], None]
"""Is called with whole pages of a file that are on the disk: the first byte, and how many."""


class Blocks:
    """A few blocks of ``nbytes``, each with room for an origin; used in turn, by one thread.

    An error of a write is raised by a later call, the last one by :meth:`drain`.  ``finished`` is called, in order, with what was
    written past the page cache.
    """

    def __init__(self, nbytes: int, finished: Finished | None = None) -> None:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        memory = mmap.mmap(-1, size * (WRITERS + SPARE_BLOCKS))
        view = memoryview(memory)
        self._free = [view[start : start + size] for start in range(0, len(view), size)]
        self._finished = finished
        self._pending: deque[tuple[Future[None], memoryview, OutputFile, int, int]] = deque()
        self._writers = ThreadPoolExecutor(WRITERS, "writer")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writers.shutdown(cancel_futures=True)

    def take(self) -> memoryview:
        """A block nobody uses; waits for the oldest write if there is none."""
        if not self._free:
            self._finish_oldest()
        return self._free.pop()

    def give(self, block: memoryview) -> None:
        """Take back a block that was not written."""
        self._free.append(block)

    def write(self, file: OutputFile, offset: int, block: memoryview, start: int, nbytes: int) -> None:
        """Write ``block[start : start + nbytes]`` at ``offset`` and take the block back; it may not be touched again."""
        data = block[start : start + nbytes]
        head = -offset % ALIGNMENT
        body = (nbytes - head) // ALIGNMENT * ALIGNMENT
        if file.direct is None or body < _SMALL_BYTES:
            write_at(file.fd, data, offset, file.path)
            self.give(block)
            return
        write_at(file.fd, data[:head], offset, file.path)
        write_at(file.fd, data[head + body :], offset + head + body, file.path)
        future = self._writers.submit(write_directly, file, data[head : head + body], offset + head)
        self._pending.append((future, block, file, offset + head, body))

    def drain(self) -> None:
        """Wait until everything is written."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        future, block, file, start, nbytes = self._pending.popleft()
        future.result()
        self.give(block)
        if self._finished:
            self._finished(file, start, nbytes)


def write_directly(file: OutputFile, data: memoryview, offset: int) -> None:
    """Write whole pages past the page cache; what the device refuses that way is written the other way."""
    assert file.direct is not None
    while data:
        try:
            count = write_once(file.direct, data, offset)
        except OSError as error:
            if error.errno not in DIRECT_REFUSED:
                raise access_error(error, file.path, "writing") from error
            write_at(file.fd, data, offset, file.path)
            return
        data, offset = data[count:], offset + count


def open_direct(path: Path, mode: int) -> int | None:
    """A descriptor past the page cache, None where the file system is not known to be good at that."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or file_system(path) not in _DIRECT_SYSTEMS:
        return None
    try:
        return os.open(path, mode | os.O_CLOEXEC | flag)
    except OSError:
        return None
