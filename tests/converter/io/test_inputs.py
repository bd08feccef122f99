"""Exact reads of a file that may shrink, fail or give less than was asked for.  Refusals to open: test_reader_contract.py."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, FormatError, MissingInputError, ref
from ckpt2pt.formats.torchfile.reader import PtFile
from ckpt2pt.io.inputs import MAX_JSON_BYTES, MAX_META_BYTES, InputFile, quoted, read_whole, sha256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 8192)
    return tmp_path / "x"


def test_reads_are_exact_and_the_size_is_known(path: Path) -> None:
    with InputFile(path) as file:
        assert file.size == 2 << 20
        assert file.read(255, 3) == b"\xff\0\1"
        assert file.read(file.size, 0) == b""
        assert len(file.read(0, file.size)) == file.size


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 2 << 20), (1, (1 << 19) + 2), (5, 6)])
def test_crc32_is_that_of_the_stretch(path: Path, start: int, stop: int) -> None:
    content = path.read_bytes()
    with InputFile(path) as file:
        assert file.crc32(start, stop) == zlib.crc32(content[start:stop])
        assert file.crc32(start, stop, zlib.crc32(b"before")) == zlib.crc32(b"before" + content[start:stop])


def test_a_file_that_shrinks_meanwhile_is_an_error_that_may_pass(path: Path) -> None:
    with InputFile(path) as file:
        os.truncate(path, 1000)
        assert len(file.read(0, 1000)) == 1000
        with pytest.raises(FileAccessError, match="ended at byte 1000"):
            file.read(900, 200)
        with pytest.raises(FileAccessError, match="ended at byte 1000"):
            file.crc32(0, file.size)


def test_reads_that_the_kernel_refuses_are_errors_of_ours() -> None:
    # The memory of a process is a regular file whose first page may not be read.
    with (
        InputFile(Path("/proc/self/mem")) as file,
        pytest.raises(FileAccessError, match="Input/output error") as caught,
    ):
        file.read(0, 8)
    assert caught.value.where == "/proc/self/mem"


def test_a_small_file_is_hashed_in_pieces(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")
    assert sha256(path, ref("metadata.path")) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_whole(path, ref("metadata.path")) == path.read_bytes()


@pytest.mark.parametrize(("read", "limit"), [(sha256, MAX_META_BYTES), (read_whole, MAX_JSON_BYTES)])
def test_metadata_of_an_absurd_size_is_refused_unread(
    path: Path, read: Callable[[Path, str], object], limit: int
) -> None:
    os.truncate(path, limit + 1)
    with pytest.raises(FormatError, match=f"larger than {limit >> 20} MiB") as caught:
        read(path, ref("metadata.path"))
    assert ref("metadata.path") in caught.value.hint


def test_hashing_takes_no_more_memory_than_a_piece(path: Path) -> None:
    os.truncate(path, 64 << 20)
    tracemalloc.start()
    try:
        sha256(path, ref("metadata.path"))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_quoted_text_is_short_and_printable() -> None:
    assert quoted("naïve\n") == "'naïve\\n'"
    assert len(quoted("x" * 1000)) < 130
    assert quoted([1, 2]) == "[1, 2]"


@pytest.mark.parametrize(("opened", "option"), [(InputFile, ref("source.path")), (PtFile, "the path of the .pt file")])
def test_a_file_that_is_not_there_is_named_as_the_user_named_it(
    tmp_path: Path, opened: type[InputFile], option: str
) -> None:
    with pytest.raises(MissingInputError) as caught:
        opened(tmp_path / "nowhere")
    assert option in caught.value.hint


def test_a_file_that_cannot_be_examined_is_an_error_with_its_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(fd: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "stale")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", gone)
        with pytest.raises(FileAccessError, match="removed or replaced on the server") as caught:
            InputFile(path)
    assert caught.value.where == str(path)
