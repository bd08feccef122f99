"""Strided copies: a block of a tensor that is cut otherwise than the files are, gathered from the stretches that hold it.

    file of tp 0  |aaaa|aaaa|aaaa|   --stretch-->  runs a  -+
                                                            +-->  block  |aaaabbbb|aaaabbbb|...
    file of tp 1  |bbbb|bbbb|bbbb|   --stretch-->  runs b  -+

A stretch is read as it lies, and numpy moves its runs; a stretch that would be mostly gaps is read run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.moves import cut
from ckpt2pt.core.plan import Copy
from ckpt2pt.io.checksums import Piece, crc32

STRETCH_BYTES = 1 << 20
_SPARSE = 16
"""Runs are read by themselves where a stretch is this many times as long, and they are long enough to be worth a call."""
_LONG_RUN_BYTES = 64 << 10

Read = Callable[[str, int, memoryview], None]
"""Fill a piece of memory from a byte of a file on."""


class Gatherer:
    """Fills blocks; holds the memory for one stretch."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._memory = memoryview(bytearray(STRETCH_BYTES))
        self.read: dict[str, list[Piece]] = {}
        """What was read of each file: first byte, bytes, CRC-32."""

    def fill(self, copies: Sequence[Copy], start: int, stop: int, width: int, out: memoryview) -> None:
        """Write the elements ``[start, stop)``, of ``width`` bytes each, into ``out``; what no copy brings is zero."""
        pieces = [piece for copy in copies for piece in copy.between(start, stop)]
        if sum(piece.numel for piece in pieces) < stop - start:
            out[:] = bytes(len(out))
        for piece, columns in _columns(pieces, STRETCH_BYTES // width):
            if columns > 1:
                self._transpose(piece, columns, start, width, out)
                continue
            for part in _parts(piece, width):
                self._move(part, start, width, out)

    def _transpose(self, first: Copy, columns: int, start: int, width: int, out: memoryview) -> None:
        """Columns side by side become rows one after the other: the stretch that they lie in is read once for all of them."""
        import numpy as np  # noqa: PLC0415 - as above
        from numpy.lib.stride_tricks import as_strided  # noqa: PLC0415

        stride, length = first.source_stride, first.runs
        each = max(1, (STRETCH_BYTES // width - columns) // stride + 1)
        for row in range(0, length, each):
            rows = min(each, length - row)
            reach = (rows - 1) * stride + columns
            stretch = self._memory[: reach * width]
            self._fetch(first._replace(source_start=first.source_start + row * stride), reach, width, stretch)
            source = as_strided(np.frombuffer(stretch, f"u{width}"), (columns, rows), (width, stride * width))
            begin = first.target_start - start + row
            end = begin + (columns - 1) * length + rows
            held = np.frombuffer(out[begin * width : end * width], f"u{width}")
            np.copyto(as_strided(held, (columns, rows), (length * width, width)), source)

    def _move(self, part: Copy, start: int, width: int, out: memoryview) -> None:
        first = (part.target_start - start) * width
        reach = (part.runs - 1) * part.source_stride + part.run
        if part.runs == 1:
            self._fetch(part, part.run, width, out[first : first + part.run * width])
            return
        import numpy as np  # noqa: PLC0415 - it takes as long as copying half a GB
        from numpy.lib.stride_tricks import as_strided  # noqa: PLC0415

        stretch = self._memory[: reach * width]
        self._fetch(part, reach, width, stretch)
        shape = part.runs, part.run
        source = as_strided(np.frombuffer(stretch, f"u{width}"), shape, (part.source_stride * width, width))
        span = ((part.runs - 1) * part.target_stride + part.run) * width
        target = as_strided(
            np.frombuffer(out[first : first + span], f"u{width}"), shape, (part.target_stride * width, width)
        )
        np.copyto(target, source)

    def _fetch(self, part: Copy, numel: int, width: int, into: memoryview) -> None:
        for extent in cut(part.storage, part.source_start * width, numel * width):
            piece, into = into[: extent.nbytes], into[extent.nbytes :]
            self._read(extent.path, extent.offset, piece)
            self._note(extent, piece)

    def _note(self, extent: Extent, piece: memoryview) -> None:
        """Stretches that follow each other are one piece: a list that grew with every block would grow with the model.

        So is what lies between them, as whoever compares the file's checksum would read it, and it is in the page cache now.
        """
        pieces = self.read.setdefault(extent.path, [])
        first, nbytes, crc = pieces[-1] if pieces else (0, 0, 0)
        gap = extent.offset - first - nbytes
        if not pieces or not 0 <= gap <= STRETCH_BYTES // 2:
            pieces.append((extent.offset, extent.nbytes, crc32(piece, 0)))
            return
        if gap:
            between = memoryview(bytearray(gap))
            self._read(extent.path, first + nbytes, between)
            crc = crc32(between, crc)
        pieces[-1] = first, nbytes + gap + extent.nbytes, crc32(piece, crc)


def _columns(pieces: Sequence[Copy], most: int) -> Iterator[tuple[Copy, int]]:
    """Each piece, and how many columns (at ``most``) of a matrix that is transposed begin with it: those that follow lie beside it."""
    at = 0
    while at < len(pieces):
        first, count = pieces[at], 1
        if first.run == first.target_stride == 1 < first.runs:
            for piece in pieces[at + 1 :]:
                beside = first._replace(
                    source_start=first.source_start + count, target_start=first.target_start + count * first.runs
                )
                if piece != beside or count == most:
                    break
                count += 1
        yield first, count
        at += count


def _parts(copy: Copy, width: int) -> Sequence[Copy]:
    """The same in stretches that fit into memory, or run by run."""
    stride = copy.source_stride * width
    dense = copy.runs > 1 and copy.source_stride == copy.target_stride == copy.run
    if dense:
        return [copy._replace(run=copy.numel, runs=1)]
    each = max(1, (STRETCH_BYTES - copy.run * width) // stride + 1) if copy.runs > 1 else 1
    if (
        copy.run * width >= _LONG_RUN_BYTES and stride > _SPARSE * copy.run * width
    ) or copy.run * width > STRETCH_BYTES:
        each = 1
    return [
        copy._replace(
            source_start=copy.source_start + number * copy.source_stride,
            target_start=copy.target_start + number * copy.target_stride,
            runs=min(each, copy.runs - number),
        )
        for number in range(0, copy.runs, each)
    ]
