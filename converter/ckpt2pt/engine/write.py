"""Carry out one rank's moves: every byte read once, written once to each place it goes, in bounded memory.

    source extents --sources--> 1 MiB block --crc, blocks--> distrib_optim.pt  (float32)
                                     '-----cast, crc, blocks--> model_optim_rng.pt

Decides nothing: offsets come from the plan and the archive's layout.  One thread sums and converts; reads and writes past
the page cache go on beside it (sources.py, blocks.py).  Why so: docs/adr/0003 and 0008.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from ckpt2pt.core.extents import DTYPE_BYTES, Extent
from ckpt2pt.core.moves import Move, Sink
from ckpt2pt.engine.blocks import Blocks, Finished, OutputFile, open_direct
from ckpt2pt.engine.casts import find_cast
from ckpt2pt.engine.readback import ReadBack, compare_crc, drop, read_back
from ckpt2pt.engine.sources import Sources
from ckpt2pt.engine.strided import Gatherer
from ckpt2pt.errors import FormatError, InterruptedRunError, TryAgainError, VolumeTooSmallError, ref, size
from ckpt2pt.io.access import access_error
from ckpt2pt.io.checksums import Piece, crc32, crc32_combine, join
from ckpt2pt.io.files import reserve, write_at
from ckpt2pt.io.framing import Layout, Payload
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.records import Json
from ckpt2pt.publish import partial_name, sync_folder
from ckpt2pt.publish.files import vanished

log = logging.getLogger("ckpt2pt")

ReadPieces = Mapping[str, Sequence[Piece]]
"""Path of a source -> what was read of it, sorted by the first bytes."""

Examine = Callable[[Mapping[str, Path]], Mapping[str, int]]
"""Reads every byte of the files of a rank, which lie under temporary names, and returns their CRC-32, by name."""

BLOCK_BYTES = 1 << 20
WRITTEN_MODE = 0o644  # less the umask


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
            raise self.error or InterruptedRunError("stopped", where="this run", hint="run the same command again")


@dataclass(slots=True)
class Output:
    """One file being written under its temporary name."""

    path: Path
    partial: Path
    layout: Layout
    file: OutputFile
    mode: int
    pieces: list[list[Piece]]
    crc: int = 0

    def offset(self, sink: Sink, numel: int) -> int:
        """Where the element ``numel`` elements after the start of a sink lies in the file."""
        return self.layout.storage_offset(sink.storage) + (sink.start + numel) * DTYPE_BYTES[sink.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that is whole, under its temporary name or its own."""

    path: Path
    nbytes: int
    crc32: int
    mtime_ns: int

    def entry(self, folder: Path) -> Json:
        """For a manifest of ``folder``."""
        return {
            "path": str(self.path.relative_to(folder)),
            "nbytes": self.nbytes,
            "crc32": f"{self.crc32:08x}",
            "mtimeNs": self.mtime_ns,
        }


@dataclass(slots=True)
class _Carrier:
    """Carries the moves of one rank."""

    outputs: Mapping[str, Output]
    sources: Sources
    blocks: Blocks
    stop: Stop
    advance: Callable[[int], None]
    gatherer: Gatherer
    digests: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])
    read: dict[str, list[Piece]] = field(default_factory=dict[str, list[Piece]])

    def carry(self, move: Move) -> None:
        """Read, sum, convert and write all elements of a move."""
        if move.copies:
            self._gather(move)
            return
        width = DTYPE_BYTES[move.dtype]
        widest = max(width, *(DTYPE_BYTES[sink.dtype] for sink in move.sinks))
        as_is = next((sink for sink in reversed(move.sinks) if sink.dtype == move.dtype), None)
        crcs = [0] * len(move.sinks)  # of what each sink got that takes another type
        total, numel, held = 0, 0, b""
        for extent in move.extents:
            done = crc = 0
            # An extent may end inside an element (MindSpore cuts slices at bytes): what is left over is held.
            while done < extent.nbytes:
                self.stop.check()
                block, origin = self.blocks.take(), self._origin(as_is, numel)
                room = max(1, (BLOCK_BYTES - origin) // widest) * width - len(held)
                size = min(room, extent.nbytes - done)
                filled = len(held) + size
                data = block[origin : origin + filled]
                data[: len(held)] = held
                self.sources.read(extent.path, extent.offset + done, data[len(held) :])
                crc = crc32(data[len(held) :], crc)
                whole = filled // width * width
                held = bytes(data[whole:])
                self._write(move, as_is, numel, block, origin, whole, crcs)
                numel, done = numel + whole // width, done + size
                self.advance(size)
            self.read.setdefault(extent.path, []).append((extent.offset, extent.nbytes, crc))
            total = crc32_combine(total, crc, extent.nbytes)
        if held:
            raise FormatError(
                f"{move.name} ends inside an element", where=move.extents[-1].path, hint="copy the checkpoint again"
            )
        self._record(move, numel, total, crcs)

    def _gather(self, move: Move) -> None:
        """The same for elements that lie apart in the sources."""
        width = DTYPE_BYTES[move.dtype]
        widest = max(width, *(DTYPE_BYTES[sink.dtype] for sink in move.sinks))
        as_is = next((sink for sink in reversed(move.sinks) if sink.dtype == move.dtype), None)
        crcs = [0] * len(move.sinks)
        start = crc = 0
        while start < move.numel:
            self.stop.check()
            block, origin = self.blocks.take(), self._origin(as_is, start)
            stop = min(move.numel, start + max(1, (BLOCK_BYTES - origin) // widest))
            data = block[origin : origin + (stop - start) * width]
            self.gatherer.fill(move.copies, start, stop, width, data)
            crc = crc32(data, crc)
            nbytes = len(data)
            self._write(move, as_is, start, block, origin, nbytes, crcs)
            self.advance(nbytes)
            start = stop
        self._record(move, move.numel, crc, crcs)

    def _origin(self, sink: Sink | None, numel: int) -> int:
        """Where in its block the next element lies: as in its page of the file that takes the block as it is."""
        if sink is None:
            return 0
        output = self.outputs[sink.file]
        return output.file.origin(output.offset(sink, numel))

    def _record(self, move: Move, numel: int, total: int, crcs: Sequence[int]) -> None:
        """One piece for a move, not for a block: a list that grew with every block would grow with the model."""
        width = DTYPE_BYTES[move.dtype]
        self.digests.setdefault(f"{move.role}:{move.name}", []).append((move.first * width, numel * width, total))
        for sink, crc in zip(move.sinks, crcs, strict=True):
            size, crc = DTYPE_BYTES[sink.dtype], crc if find_cast(move.dtype, sink.dtype) else total
            self.outputs[sink.file].pieces[sink.storage].append((sink.start * size, numel * size, crc))

    def _write(
        self, move: Move, as_is: Sink | None, numel: int, block: memoryview, origin: int, nbytes: int, crcs: list[int]
    ) -> None:
        """Send whole elements to every sink, ``numel`` elements after its start; the block itself goes last."""
        data = block[origin : origin + nbytes]
        for number, sink in enumerate(move.sinks):
            output = self.outputs[sink.file]
            cast = find_cast(move.dtype, sink.dtype)
            offset = output.offset(sink, numel)
            if cast:
                converted, start = self.blocks.take(), output.file.origin(offset)
                size = nbytes // DTYPE_BYTES[move.dtype] * DTYPE_BYTES[sink.dtype]
                cast(data, converted[start : start + size])
                crcs[number] = crc32(converted[start : start + size], crcs[number])
                self.blocks.write(output.file, offset, converted, start, size)
                continue
            if sink is not as_is:
                write_at(output.file.fd, data, offset, output.path)
        if as_is is None:
            self.blocks.give(block)
        else:
            output = self.outputs[as_is.file]
            self.blocks.write(output.file, output.offset(as_is, numel), block, origin, nbytes)


def write_files(
    folder: Path,
    payloads: Sequence[Payload],
    moves: Sequence[Move],
    *,
    stop: Stop,
    advance: Callable[[int], None],
    check: bool,
    prove: Callable[[ReadPieces], None] = lambda _: None,
    examine: Examine | None = None,
    announce: Callable[[Sequence[Written], Mapping[str, int]], None] = lambda _, __: None,
    fence: Callable[[], None] = lambda: None,
) -> tuple[tuple[Written, ...], dict[str, int]]:
    """Write a rank's files and give them their names when all of them are whole, synced and (``check``) read back.

    Returns the files, and for each ``role:parameter`` the CRC-32 of its source bytes.  ``prove`` gets what was read of
    each source before the files are finished, ``examine`` (which reads back in place of ``check``) the complete temporary
    files, ``announce`` the result before the first name appears, ``fence`` is called before each: what they raise keeps the
    names from appearing.  On any failure the temporary files are removed.
    """
    with ExitStack() as stack:
        outputs = {p.name: stack.enter_context(_output(folder, p, stop)) for p in payloads}
        readback = stack.enter_context(ReadBack())
        finished = readback.written if check and not examine else None
        digests, read = _carry(moves, outputs, stop, advance, finished)
        prove(read)
        for payload in payloads:
            _copy_template(outputs[payload.name], payload)
        for output in outputs.values():
            _finish(output)
            stop.check()
        if examine:
            _examine(outputs, examine)
        elif check:
            readback.finish(stop.check)
            for output in outputs.values():
                read_back(output.partial, output.crc, stop.check, readback.pieces(output.file))
        written = tuple(_written(output) for output in outputs.values())
        announce(written, digests)
        _publish(outputs.values(), fence)
        return written, digests


def _carry(
    moves: Sequence[Move],
    outputs: Mapping[str, Output],
    stop: Stop,
    advance: Callable[[int], None],
    finished: Finished | None,
) -> tuple[dict[str, int], ReadPieces]:
    """Carry the moves out; the CRC-32 of each ``role:parameter``, and of what was read of each source."""
    with (
        Sources(extent for move in moves for extent in move.extents) as sources,
        Blocks(BLOCK_BYTES, finished) as blocks,
    ):
        carrier = _Carrier(
            outputs=outputs,
            sources=sources,
            blocks=blocks,
            stop=stop,
            advance=advance,
            gatherer=Gatherer(sources.read_anywhere),
        )
        for move in moves:
            carrier.carry(move)
        blocks.drain()
    digests = {label: join(pieces, sum(size for _, size, _ in pieces)) for label, pieces in carrier.digests.items()}
    both = carrier.read, carrier.gatherer.read
    paths = dict.fromkeys(path for read in both for path in read)
    return digests, {path: sorted(piece for read in both for piece in read.get(path, ())) for path in paths}


@contextmanager
def _output(folder: Path, payload: Payload, stop: Stop) -> Generator[Output]:
    """A temporary file with its room reserved; removed unless it was published."""
    path = folder / payload.name
    layout = payload.lay_out()
    partial = partial_name(path)
    with ExitStack() as stack:
        stack.callback(_remove, partial)
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, WRITTEN_MODE)
            stack.callback(os.close, fd)
            reserve(fd, layout.nbytes, stop.check)
        except OSError as error:
            to_error = access_error(error, path, f"reserving {size(layout.nbytes)}")
            if error.errno == errno.EDQUOT:  # known before the first byte, and nobody else can make room
                to_error = VolumeTooSmallError(to_error.what, where=path, hint=f"raise the quota, or {to_error.hint}")
            raise to_error from error
        direct = open_direct(partial, os.O_RDWR | os.O_NOFOLLOW)
        if direct is not None:
            stack.callback(os.close, direct)
        file = OutputFile(path=path, fd=fd, direct=direct)
        pieces: list[list[Piece]] = [[] for _ in range(layout.storages)]
        yield Output(path=path, partial=partial, layout=layout, file=file, mode=payload.mode, pieces=pieces)


def _remove(partial: Path) -> None:
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def _copy_template(output: Output, payload: Payload) -> None:
    first = output.layout.storages - len(payload.copied)
    copied = dict(enumerate(payload.copied, first))
    for number, one in copied.items():
        if isinstance(one, bytes):
            _put(output, number, one)
    extents = ((number, one) for number, one in copied.items() if isinstance(one, Extent))
    for path, numbered in groupby(extents, lambda one: one[1].path):
        with InputFile(Path(path), ref("metadata.path"), keep=True) as file:
            for number, extent in numbered:
                _put(output, number, file.read(extent.offset, extent.nbytes))


def _put(output: Output, number: int, data: bytes | bytearray) -> None:
    """Fill a storage."""
    write_at(output.file.fd, memoryview(data), output.layout.storage_offset(number), output.path)
    output.pieces[number].append((0, len(data), crc32(data, 0)))


def _finish(output: Output) -> None:
    crcs = [join(pieces, output.layout.storage_nbytes(number)) for number, pieces in enumerate(output.pieces)]
    try:
        output.crc = output.layout.finish(output.file.fd, crcs)
        if output.mode != WRITTEN_MODE:
            _set_mode(output)
        os.fsync(output.file.fd)
    except OSError as error:
        raise access_error(error, output.path, "writing") from error


def _set_mode(output: Output) -> None:
    """Permissions are a courtesy: a file system that has none, or keeps its own, does not make the bytes wrong."""
    try:
        os.fchmod(output.file.fd, output.mode)
    except OSError as error:
        log.warning(
            "%s: mode %04o cannot be set (%s): the file is complete, and keeps the mode that the file system gave it",
            output.path, output.mode, error.strerror,
        )  # fmt: skip


def _written(output: Output) -> Written:
    try:
        found = os.fstat(output.file.fd)
    except OSError as error:
        raise access_error(error, output.path, "writing") from error
    return Written(path=output.path, nbytes=found.st_size, crc32=output.crc, mtime_ns=found.st_mtime_ns)


def _publish(outputs: Iterable[Output], fence: Callable[[], None]) -> None:
    folders: set[Path] = set()
    for output in outputs:
        fence()
        try:
            output.partial.replace(output.path)
        except FileNotFoundError as error:
            raise vanished(output.path) from error
        except OSError as error:
            raise access_error(error, output.path, "publishing") from error
        folders.add(output.path.parent)
    for folder in folders:
        try:
            sync_folder(folder)
        except OSError as error:
            raise access_error(error, folder, "syncing the folder") from error


def _examine(outputs: Mapping[str, Output], examine: Examine) -> None:
    """Have the files examined as they are on the disk; one pass proves their elements and their CRC-32."""
    partials = {name: output.partial for name, output in outputs.items()}
    for path in partials.values():
        drop(path)
    found = examine(partials)
    for name, output in outputs.items():
        compare_crc(output.partial, found[name], output.crc)


class Meter:
    """Counts bytes and passes them on at most every ``interval`` seconds."""

    def __init__(self, report: Callable[[int], None], interval: float = 0.2) -> None:
        self._report, self._interval = report, interval
        self._held = 0
        self._last = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Count bytes."""
        self._held += nbytes
        if time.monotonic() - self._last >= self._interval:
            self.flush()

    def flush(self) -> None:
        """Pass on what is left."""
        held, self._held, self._last = self._held, 0, time.monotonic()
        if held:
            self._report(held)
