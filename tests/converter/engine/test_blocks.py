"""Blocks on their way into files: every byte at its place, by way of the page cache or past it, and no error lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt2pt.engine import blocks as module
from ckpt2pt.engine.blocks import ALIGNMENT, Blocks, OutputFile, open_direct
from ckpt2pt.errors import FileAccessError, NoSpaceError
from ckpt2pt.io.files import write_at

NBYTES = 1 << 20


@pytest.fixture(params=["direct", "buffered"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OutputFile]:
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 6 * NBYTES)
    direct = open_direct(path, os.O_WRONLY) if request.param == "direct" else None
    if direct is None and request.param == "direct":
        pytest.skip("direct writes are not used on this file system")
    yield OutputFile(path=path, fd=fd, direct=direct)
    os.close(fd)
    if direct is not None:
        os.close(direct)


def pattern(nbytes: int, seed: int) -> bytes:
    return (seed.to_bytes(3, "little") + b"0123456789") * (nbytes // 13) + b"!" * (nbytes % 13)


def write_blocks(file: OutputFile, count: int) -> None:
    with Blocks(NBYTES) as blocks:
        for number in range(count):
            blocks.write(file, number * NBYTES, blocks.take(), 0, NBYTES)
        blocks.drain()


EDGES = (0, 1, 4, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 2)


@pytest.mark.parametrize("first", EDGES)
@pytest.mark.parametrize("short", EDGES)
def test_neighbours_meet_at_any_byte(file: OutputFile, first: int, short: int) -> None:
    sizes = [300_000 - short, 70_000, 1, NBYTES - 2 * ALIGNMENT, 0, 5, NBYTES - 2 * ALIGNMENT - 3, 5000]
    wanted, offset = bytearray(first), first
    with Blocks(NBYTES) as blocks:
        for number, size in enumerate(sizes):
            block, start = blocks.take(), file.origin(offset)
            data = pattern(size, number)
            block[start : start + size] = data
            blocks.write(file, offset, block, start, size)
            wanted += data
            offset += size
        blocks.drain()
    os.fsync(file.fd)
    assert file.path.read_bytes() == wanted + bytes(6 * NBYTES - len(wanted))


def test_pages_of_block_and_file_lie_on_each_other(file: OutputFile) -> None:
    assert file.origin(5 * ALIGNMENT + 7) == (0 if file.direct is None else 7)


def test_an_error_of_a_writer_is_raised(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpaceError):
        write_blocks(file, 1)


def test_an_error_is_raised_before_the_blocks_run_out(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(FileAccessError):
        write_blocks(file, 100)


def test_a_bug_in_a_writer_is_raised(file: OutputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(fd: int, data: memoryview, offset: int) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(os, "pwrite", bug)
    with pytest.raises(ZeroDivisionError):
        write_blocks(file, 1)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_what_is_refused_past_the_cache_is_written_through_it(
    number: int, file: OutputFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def picky(fd: int, data: memoryview, offset: int) -> int:
        if fd == file.direct:
            raise OSError(number, "odd")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    with Blocks(NBYTES) as blocks:
        block = blocks.take()
        block[:NBYTES] = data = pattern(NBYTES, 1)
        blocks.write(file, 0, block, 0, NBYTES)
        blocks.drain()
    assert file.path.read_bytes()[:NBYTES] == data


def test_a_kernel_that_writes_less_than_asked_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        write_at(fd, memoryview(b"0123456789"), 2, tmp_path / "file")
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"\0\x000123456789"


def test_an_unknown_file_system_is_written_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "file_system", lambda path: "nfs4")
    assert open_direct(tmp_path / "file", os.O_WRONLY) is None
