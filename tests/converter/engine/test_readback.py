"""What was written is read back from the disk, each byte once, most of it early; what differs there is found wherever it lies."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.engine import blocks
from ckpt2pt.engine import readback as module
from ckpt2pt.engine.blocks import ALIGNMENT, Blocks, OutputFile, open_direct
from ckpt2pt.engine.readback import BLOCK_BYTES, READERS, ReadBack, Region, read_back
from ckpt2pt.engine.write import Stop, write_files
from ckpt2pt.errors import InterruptedRunError, VerificationError
from ckpt2pt.formats.mindspore.writer import mindspore_file
from entries import entry_of, moves_into

SIZES = (3 * BLOCK_BYTES + 5, 70_000, 11, BLOCK_BYTES, 200_000)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OutputFile]:
    with ExitStack() as stack:
        path = tmp_path / "file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, fd)
        os.ftruncate(fd, 3 + sum(SIZES) + 100)
        direct = open_direct(path, os.O_RDWR)
        if direct is None:
            pytest.skip("direct writes are not used on this file system")
        stack.callback(os.close, direct)
        yield OutputFile(path=path, fd=fd, direct=direct)


def write(file: OutputFile, readback: ReadBack | None = None) -> int:
    """Stretches one behind the other, in blocks, with bytes of a frame around; the CRC-32 of the file."""
    offset = 3
    with Blocks(BLOCK_BYTES, readback.written if readback else None) as queue:
        for number, size in enumerate(SIZES):
            done = 0
            while done < size:
                block, start = queue.take(), file.origin(offset + done)
                nbytes = min(BLOCK_BYTES - start, size - done)
                block[start : start + nbytes] = os.urandom(1) * nbytes
                queue.write(file, offset + done, block, start, nbytes)
                done += nbytes
            offset += size + (number == 0)  # a byte that is a hole
        queue.drain()
    os.fsync(file.fd)
    return zlib.crc32(file.path.read_bytes())


def read_early(file: OutputFile, readback: ReadBack) -> list[tuple[int, int, int]]:
    readback.finish(lambda: None)
    os.fsync(file.fd)
    module.drop(file.path)  # the test itself has read it
    return readback.pieces(file)


def test_whole_pages_are_read_early_and_the_rest_once(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReadBack() as readback:
        crc = write(file, readback)
        pieces = read_early(file, readback)
    data = file.path.read_bytes()
    assert all(known == zlib.crc32(data[first : first + size]) for first, size, known in pieces)
    assert all(first % ALIGNMENT == size % ALIGNMENT == 0 for first, size, _ in pieces)
    early = sum(size for _, size, _ in pieces)
    assert len(data) - early < 2 * ALIGNMENT * len(SIZES) + 70_000
    counted: list[int] = []
    real: Callable[[int, list[memoryview], int], int] = os.preadv

    def preadv(fd: int, into: list[memoryview], offset: int) -> int:
        counted.append(len(into[0]))
        return real(fd, into, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    read_back(file.path, crc, read=pieces)
    assert sum(counted) == len(data) - early
    with pytest.raises(VerificationError, match=f"{crc:08x} on the disk"):
        read_back(file.path, crc ^ 1, read=pieces)


@pytest.mark.parametrize("place", [0, 3, ALIGNMENT, BLOCK_BYTES, 3 * BLOCK_BYTES + 8, sum(SIZES) + 102])
def test_a_byte_that_differs_on_the_disk_is_found_wherever_it_lies(file: OutputFile, place: int) -> None:
    with ReadBack() as readback:
        crc = write(file)
        meant = os.pread(file.fd, 1, place)
        os.pwrite(file.fd, bytes((meant[0] ^ 1,)), place)  # what a broken disk would do
        os.fsync(file.fd)
        readback.written(file, ALIGNMENT, 3 * BLOCK_BYTES)
        pieces = read_early(file, readback)
        assert [piece[:2] for piece in pieces] == [(ALIGNMENT, 3 * BLOCK_BYTES)]
        with pytest.raises(VerificationError, match="on the disk"):
            read_back(file.path, crc, read=pieces)
        os.pwrite(file.fd, meant, place)
        read_back(file.path, crc)


def test_what_the_page_cache_answers_is_not_taken_as_read_from_the_disk(file: OutputFile) -> None:
    with ReadBack() as readback:
        write(file, readback)  # which reads all of it into the page cache
        readback.finish(lambda: None)
        assert readback.pieces(file) == []


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), None], ids=["an-error", "a-short-read"])
def test_what_cannot_be_read_early_is_left_to_the_end(
    error: OSError | None, file: OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, into: memoryview, offset: int) -> int:
        if error:
            raise error
        return len(into) - ALIGNMENT

    monkeypatch.setattr(module, "read_once", fail)
    with ReadBack() as readback:
        crc = write(file, readback)
        assert read_early(file, readback) == []
        read_back(file.path, crc)


def test_pieces_of_a_long_file_are_joined(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", ALIGNMENT)
    with ReadBack() as readback:
        write(file)
        for start in range(0, 3 * BLOCK_BYTES, BLOCK_BYTES):
            readback.written(file, start, BLOCK_BYTES)
        assert [piece[:2] for piece in read_early(file, readback)] == [(0, 3 * BLOCK_BYTES)]


def test_whoever_waits_is_asked_to_stop(file: OutputFile) -> None:
    def stopped() -> None:
        raise InterruptedRunError("stopped", where="here", hint="again")

    with ReadBack() as readback:
        readback.written(file, 0, 3 * BLOCK_BYTES)
        with pytest.raises(InterruptedRunError, match="stopped"):
            readback.finish(stopped)
    assert not any(thread.name.startswith("readback") for thread in threading.enumerate())


def test_a_failure_of_the_writer_ends_the_readers(file: OutputFile) -> None:
    def fail(readback: ReadBack) -> None:
        with readback:
            readback.written(file, 0, 3 * BLOCK_BYTES)
            raise KeyError

    readback = ReadBack()
    with pytest.raises(KeyError):
        fail(readback)
    assert not any(thread.name.startswith("readback") for thread in threading.enumerate())


def test_a_disk_that_lies_is_found_before_anything_is_published(
    file: OutputFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = blocks.write_directly

    def lying(file: OutputFile, data: memoryview, offset: int) -> None:
        real(file, data, offset)
        os.pwrite(file.fd, bytes((data[9] ^ 1,)), offset + 9)

    monkeypatch.setattr(blocks, "write_directly", lying)
    source, folder, nbytes = tmp_path / "source", tmp_path / "out", 3 * BLOCK_BYTES
    source.write_bytes(os.urandom(nbytes))
    folder.mkdir()
    ref = TensorRef(name="w", dtype="float32", shape=(nbytes // 4,), extents=(Extent(str(source), 0, nbytes),))
    made = mindspore_file("ckpt", "x.ckpt", [entry_of(ref)], crc=False)
    with pytest.raises(VerificationError, match="on the disk"):
        write_files(folder, [made], moves_into(made, [ref]), stop=Stop(), advance=lambda _: None, check=True)
    assert not list(folder.iterdir())


def test_regions_of_files_that_take_turns_are_few(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Region] = []
    go = threading.Event()

    def region(file: OutputFile, start: int, stop: int) -> Region:
        made.append(Region(file, start, stop))
        return made[-1]

    def wait(fd: int, into: memoryview, offset: int) -> int:
        go.wait()
        return len(into)

    monkeypatch.setattr(module, "Region", region)
    monkeypatch.setattr(module, "read_once", wait)
    other = OutputFile(path=file.path.with_name("other"), fd=file.fd, direct=file.direct)
    with ReadBack() as readback:
        for number in range(50):
            readback.written(file, number * ALIGNMENT, ALIGNMENT)
            readback.written(other, number * ALIGNMENT, ALIGNMENT)
        go.set()
        readback.finish(lambda: None)
    assert len(made) <= 2 + READERS  # those that the readers took at once, and one of each file
