"""What was written, read back from the disk and compared with what was meant, most of it while the rest is being written.

    Blocks --a region is on the disk--> backlog --O_DIRECT, two threads--> CRC-32 of the region
    frame written, file synced --> the gaps between those regions are read, from the disk --> CRC-32 of the file

Only regions that were written past the page cache are read early: for them a direct read asks the disk.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ckpt2pt.core.extents import Extent
from ckpt2pt.engine.blocks import OutputFile
from ckpt2pt.engine.sources import Sources, drop_from_cache, is_cached
from ckpt2pt.errors import VerificationError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.checksums import Piece, crc32, crc32_combine
from ckpt2pt.io.files import read_once
from ckpt2pt.publish.files import vanished

BLOCK_BYTES = 1 << 20
READERS = 2  # one alone waits for the disk between two reads
_HEED_SECONDS = 0.2


class Region:
    """Neighbouring bytes of a file that wait to be read back."""

    __slots__ = ("file", "start", "stop")

    def __init__(self, file: OutputFile, start: int, stop: int) -> None:
        self.file, self.start, self.stop = file, start, stop


class ReadBack:
    """Reads regions of files back while others are written.  Holds no more than a block for each of its threads.

    What it cannot read it leaves to :func:`read_back`, which then tells why.
    """

    def __init__(self) -> None:
        self._backlog: deque[Region] = deque()
        self._last: dict[Path, Region] = {}
        self._pieces: dict[Path, list[Piece]] = {}
        self._news = threading.Condition()
        self._reading, self._complete = 0, False
        self._threads = [threading.Thread(target=self._run, name=f"readback-{n}", daemon=True) for n in range(READERS)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._news:
            self._backlog.clear()
        self._end()
        for thread in self._threads:
            if thread.ident:
                thread.join()

    def written(self, file: OutputFile, start: int, nbytes: int) -> None:
        """Hear of whole pages of a file that are on the disk now, and will not be written again."""
        with self._news:
            last = self._last.get(file.path)
            if last and last.start < last.stop == start:  # it waits still
                last.stop += nbytes
            else:
                self._last[file.path] = Region(file, start, start + nbytes)
                self._backlog.append(self._last[file.path])
            self._news.notify()
        for thread in self._threads:
            if not thread.ident:
                thread.start()

    def finish(self, heed: Callable[[], None]) -> None:
        """Wait until all of them are read.  ``heed`` is called meanwhile, and may raise."""
        self._end()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(_HEED_SECONDS)
                heed()

    def pieces(self, file: OutputFile) -> list[Piece]:
        """What was read of a file from the disk, sorted; nothing where its pages are in the page cache after all."""
        found = _joined(self._pieces.get(file.path, []))
        # ext4 with data=journal, for one, answers direct reads and writes through the page cache.
        return [] if found and is_cached(file.fd) else found

    def _end(self) -> None:
        with self._news:
            self._complete = True
            self._news.notify_all()

    def _run(self) -> None:
        block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        while taken := self._take():
            file, start, size = taken
            data = block[:size]
            if not _filled(file, start, data):
                continue
            piece = start, size, crc32(data, 0)
            with self._news:
                pieces = self._pieces.setdefault(file.path, [])
                pieces.append(piece)
                if len(pieces) % 64 == 0:  # else the list would grow with the model
                    pieces[:] = _joined(pieces)

    def _take(self) -> tuple[OutputFile, int, int] | None:
        """The next block to read; None when there will be none."""
        with self._news:
            while not self._backlog:
                if self._complete:
                    return None
                self._news.wait()
            region = self._backlog[0]
            start, size = region.start, min(BLOCK_BYTES, region.stop - region.start)
            region.start += size
            if region.start == region.stop:
                self._backlog.popleft()
            return region.file, start, size


def _filled(file: OutputFile, start: int, data: memoryview) -> bool:
    """Read pages past the page cache; false where that fails or ends early."""
    assert file.direct is not None
    try:
        return read_once(file.direct, data, start) == len(data)
    except OSError:
        return False


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces sorted, neighbours as one."""
    found: list[Piece] = []
    for start, size, crc in sorted(pieces):
        first, nbytes, known = found[-1] if found else (0, 0, 0)
        if found and first + nbytes == start:
            found[-1] = first, nbytes + size, crc32_combine(known, crc, size)
        else:
            found.append((start, size, crc))
    return found


def read_back(path: Path, expected: int, heed: Callable[[], None] = lambda: None, read: Sequence[Piece] = ()) -> None:
    """Read a file from the disk rather than from memory and compare its CRC-32.

    ``read`` are pieces of it, sorted, that were read back already.  ``heed`` is called after every block, and may raise.
    """
    block, crc = memoryview(bytearray(BLOCK_BYTES)), 0
    nbytes = drop(path)
    gaps = list(_gaps(read, nbytes))
    with Sources(Extent(str(path), start, size) for start, size in gaps if size >= BLOCK_BYTES) as sources:
        for (start, size), (_, known, piece) in zip(gaps, [*read, (nbytes, 0, 0)], strict=True):
            # A window for a few bytes would read what is known.
            get = sources.read if size >= BLOCK_BYTES else sources.read_anywhere
            for position in range(0, size, BLOCK_BYTES):
                data = block[: size - position]
                get(str(path), start + position, data)
                crc = crc32(data, crc)
                heed()
            crc = crc32_combine(crc, piece, known)
    compare_crc(path, crc, expected)


def _gaps(read: Sequence[Piece], nbytes: int) -> Iterator[tuple[int, int]]:
    """First byte and size of what lies before each piece, and of what lies behind the last; some have no bytes."""
    stop = 0
    for start, size, _ in read:
        yield stop, start - stop
        stop = start + size
    yield stop, nbytes - stop


def drop(path: Path) -> int:
    """Have a file of ours read from the disk by whoever reads it next; its size."""
    try:
        return drop_from_cache(path)
    except FileNotFoundError as error:
        raise vanished(path) from error
    except OSError as error:
        raise access_error(error, path, "reading back", reading=True) from error


def compare_crc(path: Path, crc: int, expected: int) -> None:
    """Refuse a file that is not on the disk as it was written."""
    if crc != expected:
        raise VerificationError(
            f"CRC-32 is {crc:08x} on the disk, {expected:08x} was written",
            where=path,
            hint="check the target volume (dmesg, quota, mount options), remove the file and run the same command again",
        )


def is_whole(path: Path, expected: int) -> bool:
    """Whether a file on the disk has that CRC-32."""
    try:
        read_back(path, expected)
    except VerificationError:
        return False
    return True
