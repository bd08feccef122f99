"""Carry out one rank's moves: every byte read once, written once to each place it goes, in bounded memory.

    source extents --preadv--> 512 KiB buffer --crc, pwrite--> distrib_optim.pt  (float32)
                                      '------cast, crc, pwrite--> model_optim_rng.pt

Decides nothing: offsets come from the plan and the archive's layout.  Buffers larger than a core's cache, and mmap as
a copy source, were slower (docs/adr/0003-own-pt-writer.md).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckpt2pt.casts import find_cast
from ckpt2pt.checksums import Piece, crc32, join
from ckpt2pt.errors import FormatError, InterruptedRunError, TryAgainError, VerificationError
from ckpt2pt.framing import Layout, Payload
from ckpt2pt.plan.moves import Move, Sink
from ckpt2pt.publish import access_error, partial_name, sync_folder
from ckpt2pt.tensors import DTYPE_BYTES, Extent

BLOCK_BYTES = 512 << 10
WRITTEN_MODE = 0o644  # less the umask
THREADS = 1  # of one rank; two share a file's readahead and lock: not faster, and more CPU when the source is cold


class Stop:
    """Asks running moves to end; the first reason counts."""

    def __init__(self) -> None:
        self.error: TryAgainError | None = None
        self._asked = threading.Event()

    def ask(self, error: TryAgainError) -> None:
        """End soon, with this error.  Safe in a signal handler."""
        self.error = self.error or error
        self._asked.set()

    def check(self) -> None:
        """Raise if somebody asked."""
        if self._asked.is_set():
            raise self.error or InterruptedRunError("stopped", where="this run", mend="run the same command again")


@dataclass(slots=True)
class Output:
    """One file being written under its temporary name."""

    path: Path
    partial: Path
    layout: Layout
    fd: int
    mode: int
    pieces: list[list[Piece]]
    crc: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A published file."""

    path: Path
    nbytes: int
    crc32: int

    def entry(self, folder: Path) -> dict[str, object]:
        """For a manifest of ``folder``."""
        return {"path": str(self.path.relative_to(folder)), "nbytes": self.nbytes, "crc32": f"{self.crc32:08x}"}


@dataclass(slots=True)
class _Carrier:
    """What the threads of one rank share."""

    outputs: Mapping[str, Output]
    sources: Mapping[str, int]
    stop: Stop
    advance: Callable[[int], None]
    digests: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])

    def carry(self, moves: Iterator[tuple[Move, ...]], buffers: _Buffers) -> None:
        """Take moves until none is left."""
        for batch in moves:
            for move in batch:
                self._carry_one(move, buffers)

    def _carry_one(self, move: Move, buffers: _Buffers) -> None:
        width = DTYPE_BYTES[move.dtype]
        first = move.first
        buffers.crcs = [0] * (1 + len(move.sinks))
        for extent in move.extents:
            done = 0
            # An extent may end inside an element (MindSpore cuts slices at bytes): blocks are joined until they do not.
            while done < extent.nbytes:
                self.stop.check()
                size = min(BLOCK_BYTES - buffers.held, extent.nbytes - done)
                self._read(extent, done, buffers, size)
                done += size
                whole = buffers.filled // width * width
                first += self._write(move, first, buffers, whole)
                self.advance(size)
        if buffers.held:
            raise FormatError(
                f"{move.name} ends inside an element", where=move.extents[-1].path, mend="copy the checkpoint again"
            )
        self._record(move, first - move.first, buffers.crcs)

    def _record(self, move: Move, numel: int, crcs: Sequence[int]) -> None:
        """One piece for a move, not for a block: a list that grew with every block would grow with the model."""
        width = DTYPE_BYTES[move.dtype]
        self.digests.setdefault(f"{move.role}:{move.name}", []).append((move.first * width, numel * width, crcs[0]))
        for sink, crc in zip(move.sinks, crcs[1:], strict=True):
            size = DTYPE_BYTES[sink.dtype]
            self.outputs[sink.file].pieces[sink.storage].append((sink.start * size, numel * size, crc))

    def _read(self, extent: Extent, done: int, buffers: _Buffers, size: int) -> None:
        start = buffers.held
        got = 0
        while got < size:
            try:
                count = os.preadv(
                    self.sources[extent.path], [buffers.raw[start + got : start + size]], extent.offset + done + got
                )
            except OSError as error:
                raise access_error(error, extent.path, "reading") from error
            if not count:
                raise TryAgainError(
                    f"the file ended at byte {extent.offset + done + got} while it was being read",
                    where=extent.path,
                    mend="make sure that nothing writes the source, and run the same command again",
                )
            got += count
        buffers.filled = start + size

    def _write(self, move: Move, first: int, buffers: _Buffers, nbytes: int) -> int:
        """Write whole elements to every sink and keep the rest for the next block; returns elements written."""
        numel = nbytes // DTYPE_BYTES[move.dtype]
        if nbytes:
            buffers.crcs[0] = crc32(buffers.raw[:nbytes], buffers.crcs[0])
            for number, sink in enumerate(move.sinks, 1):
                buffers.crcs[number] = self._put(move, sink, first, buffers, nbytes, buffers.crcs[number])
        rest = buffers.filled - nbytes
        if rest:
            buffers.raw[:rest] = bytes(buffers.raw[nbytes : nbytes + rest])
        buffers.held = buffers.filled = rest
        return numel

    def _put(self, move: Move, sink: Sink, first: int, buffers: _Buffers, nbytes: int, crc: int) -> int:
        """Write one block to one sink; returns the CRC-32 of what it got of this move."""
        output = self.outputs[sink.file]
        cast = find_cast(move.dtype, sink.dtype)
        width = DTYPE_BYTES[sink.dtype]
        if cast is None:
            data, crc = buffers.raw[:nbytes], buffers.crcs[0]
        else:
            out = buffers.second(nbytes // DTYPE_BYTES[move.dtype] * width)
            cast(np.frombuffer(buffers.raw, np.uint8, nbytes), out)
            data = memoryview(out.data)
            crc = crc32(data, crc)
        offset = (sink.start + first - move.first) * width
        write_at(output.fd, data, output.layout.storage_offset(sink.storage) + offset, output.path)
        return crc


class _Buffers:
    """One thread's memory: the block, and its converted twin."""

    def __init__(self) -> None:
        self.raw = memoryview(bytearray(BLOCK_BYTES))
        self.held = 0
        self.filled = 0
        self.crcs: list[int] = []  # of the move so far: its source bytes, then what each sink got
        self._second = np.empty(BLOCK_BYTES, np.uint8)

    def second(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Room for converted elements; grows only for types that widen."""
        if nbytes > self._second.size:
            self._second = np.empty(nbytes, np.uint8)
        return self._second[:nbytes]


def write_at(fd: int, data: memoryview, offset: int, path: Path) -> None:
    """pwrite all of ``data``; the kernel may take less at a time."""
    while data:
        try:
            count = os.pwrite(fd, data, offset)
        except OSError as error:
            raise access_error(error, path, "writing") from error
        data, offset = data[count:], offset + count


def write_files(
    folder: Path,
    payloads: Sequence[Payload],
    moves: Sequence[Move],
    *,
    stop: Stop,
    advance: Callable[[int], None],
    check: bool,
) -> tuple[tuple[Written, ...], dict[str, int]]:
    """Write a rank's files and give them their names when all of them are whole, synced and (``check``) read back.

    Returns the files, and for each ``role:parameter`` the CRC-32 of its source bytes.  On any failure the temporary
    files are removed and no final name has changed.
    """
    with ExitStack() as stack:
        outputs = {p.name: stack.enter_context(_output(folder, p)) for p in payloads}
        sources = _open_sources(stack, [extent.path for move in moves for extent in move.extents])
        carrier = _Carrier(outputs=outputs, sources=sources, stop=stop, advance=advance)
        _carry_all(carrier, moves)
        for payload in payloads:
            _copy_template(outputs[payload.name], payload)
        for output in outputs.values():
            _finish(output)
            stop.check()
        if check:
            for output in outputs.values():
                read_back(output.partial, output.crc, stop)
        return _publish(outputs.values()), {
            label: join(pieces, sum(size for _, size, _ in pieces)) for label, pieces in carrier.digests.items()
        }


def _carry_all(carrier: _Carrier, moves: Sequence[Move]) -> None:
    """Share the moves between threads.  A batch keeps neighbours in the source together."""
    queue = iter(_batches(moves))
    lock = threading.Lock()

    def take() -> Iterator[tuple[Move, ...]]:
        while True:
            with lock:
                batch = next(queue, None)
            if batch is None:
                return
            yield batch

    # Two threads may meet in one tensor's list of digests; list.append is atomic and order does not matter.
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(carrier.carry, take(), _Buffers()) for _ in range(THREADS)]
        first: BaseException | None = None
        for future in as_completed(futures):
            error = future.exception()
            if error is not None and first is None:
                first = error
                carrier.stop.ask(
                    error
                    if isinstance(error, TryAgainError)
                    else TryAgainError("another thread failed", where="this rank", mend="see the first error")
                )
        if first is not None:
            raise first


def _batches(moves: Sequence[Move], size: int = 1 << 20) -> Iterator[tuple[Move, ...]]:
    batch: list[Move] = []
    held = 0
    for move in moves:
        batch.append(move)
        held += move.nbytes
        if held >= size:
            yield tuple(batch)
            batch, held = [], 0
    if batch:
        yield tuple(batch)


@contextmanager
def _output(folder: Path, payload: Payload) -> Generator[Output]:
    """A temporary file with its room reserved; removed unless it was published."""
    path = folder / payload.name
    layout = payload.lay_out()
    partial = partial_name(path)
    fd = -1
    try:
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, WRITTEN_MODE)
            _reserve(fd, layout.nbytes)
        except OSError as error:
            raise access_error(error, path, f"reserving {layout.nbytes} bytes") from error
        pieces: list[list[Piece]] = [[] for _ in range(layout.storages)]
        yield Output(path=path, partial=partial, layout=layout, fd=fd, mode=payload.mode, pieces=pieces)
    finally:
        if fd >= 0:
            os.close(fd)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _reserve(fd: int, nbytes: int) -> None:
    """Take the room now, so that a full disk is met before the first byte."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        # Some network file systems cannot; there the disk may still fill in the middle.
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        os.ftruncate(fd, nbytes)


def _open_sources(stack: ExitStack, paths: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in dict.fromkeys(paths):
        try:
            found[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise access_error(error, path, "opening") from error
        stack.callback(os.close, found[path])
        os.posix_fadvise(found[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return found


def _copy_template(output: Output, payload: Payload) -> None:
    first = output.layout.storages - len(payload.copied)
    for number, extent in enumerate(payload.copied, first):
        with Path(extent.path).open("rb") as file:
            data = os.pread(file.fileno(), extent.nbytes, extent.offset)
        if len(data) != extent.nbytes:
            raise FormatError("the file is shorter than its index says", where=extent.path, mend="copy it again")
        write_at(output.fd, memoryview(data), output.layout.storage_offset(number), output.path)
        output.pieces[number].append((0, len(data), crc32(data, 0)))


def _finish(output: Output) -> None:
    crcs = [join(pieces, output.layout.storage_nbytes(number)) for number, pieces in enumerate(output.pieces)]
    try:
        output.crc = output.layout.finish(output.fd, crcs)
        if output.mode != WRITTEN_MODE:
            os.fchmod(output.fd, output.mode)
        os.fsync(output.fd)
    except OSError as error:
        raise access_error(error, output.path, "writing") from error


def _publish(outputs: Iterable[Output]) -> tuple[Written, ...]:
    written: list[Written] = []
    for output in outputs:
        try:
            output.partial.replace(output.path)
        except OSError as error:
            raise access_error(error, output.path, "publishing") from error
        written.append(Written(path=output.path, nbytes=output.layout.nbytes, crc32=output.crc))
    for folder in {file.path.parent for file in written}:
        sync_folder(folder)
    return tuple(written)


def read_back(path: Path, expected: int, stop: Stop | None = None) -> None:
    """Read a file from the disk rather than from memory and compare its CRC-32."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    crc = 0
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            position = 0
            while count := os.preadv(fd, [buffer], position):
                crc = crc32(buffer[:count], crc)
                position += count
                if stop:
                    stop.check()
        finally:
            os.close(fd)
    except OSError as error:
        raise access_error(error, path, "reading back") from error
    if crc != expected:
        raise VerificationError(
            f"CRC-32 is {crc:08x} on the disk, {expected:08x} was written",
            where=path,
            mend="check the target volume (dmesg, quota, mount options), remove the file and run the same command again",
        )


class Meter:
    """Counts bytes from several threads and passes them on at most every ``interval`` seconds."""

    def __init__(self, report: Callable[[int], None], interval: float = 0.2) -> None:
        self._report, self._interval = report, interval
        self._lock = threading.Lock()
        self._held = 0
        self._last = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Count bytes."""
        with self._lock:
            self._held += nbytes
            if time.monotonic() - self._last < self._interval:
                return
            self._flush()

    def flush(self) -> None:
        """Pass on what is left."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        held, self._held, self._last = self._held, 0, time.monotonic()
        if held:
            self._report(held)
