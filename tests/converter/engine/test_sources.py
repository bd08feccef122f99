"""Sources read from the page cache and past it: every byte, in the order of the moves, and no error lost."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent
from ckpt2pt.engine.blocks import ALIGNMENT, open_direct
from ckpt2pt.engine.sources import WINDOW_BYTES, WINDOWS, Sources, drop_from_cache, is_cached
from ckpt2pt.errors import FileAccessError

Preadv = Callable[[int, Sequence[memoryview], int], int]
NBYTES = (WINDOWS + 2) * WINDOW_BYTES + 1234


def make(path: Path, nbytes: int = NBYTES, seed: int = 1) -> bytes:
    data = np.random.default_rng(seed).bytes(nbytes)
    path.write_bytes(data)
    return data


def on_disk(path: Path) -> None:
    """Take a file out of the page cache; skip where that has no effect or past it nothing is read."""
    os.sync()
    drop_from_cache(path)
    fd = os.open(path, os.O_RDONLY)
    cached, direct = is_cached(fd), open_direct(path, os.O_RDONLY)
    os.close(fd)
    if direct is not None:
        os.close(direct)
    if cached or direct is None:
        pytest.skip("this file system has no direct reads")


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A file that is read past the page cache."""
    make(tmp_path / "file")
    on_disk(tmp_path / "file")
    return tmp_path / "file"


def read_all(extents: Sequence[Extent], block: int = WINDOW_BYTES) -> bytes:
    """As the engine does: each extent in blocks."""
    found = bytearray()
    with Sources(extents) as sources:
        for path, offset, nbytes in extents:
            for done in range(0, nbytes, block):
                into = memoryview(bytearray(min(block, nbytes - done)))
                sources.read(path, offset + done, into)
                found += into
    return bytes(found)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every read."""
    calls: list[tuple[int, int]] = []
    real: Preadv = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append((offset, len(buffers[0])))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def test_a_cold_file_is_read_past_the_cache_and_stays_out_of_it(direct: Path) -> None:
    assert read_all([Extent(str(direct), 0, NBYTES)]) == direct.read_bytes()
    drop_from_cache(direct)
    read_all([Extent(str(direct), 0, NBYTES)])
    fd = os.open(direct, os.O_RDONLY)
    assert not is_cached(fd)
    os.close(fd)


def test_a_file_in_the_cache_is_read_from_there_into_the_block_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path / "file")
    calls = counted(monkeypatch)
    assert read_all([Extent(str(tmp_path / "file"), 5, 1000), Extent(str(tmp_path / "file"), 2000, 7)]) == (
        data[5:1005] + data[2000:2007]
    )
    assert calls == [(5, 1000), (2000, 7)]


def test_only_windows_that_somebody_wants_are_read(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    read_all([Extent(str(direct), 10, 20), Extent(str(direct), 50, 4), Extent(str(direct), 3 * WINDOW_BYTES - 1, 2)])
    assert calls == [(n * WINDOW_BYTES, WINDOW_BYTES) for n in (0, 2, 3)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, NBYTES - 1), st.integers(0, 300_000)), max_size=9))
def test_any_extents_in_any_order_are_read(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("extents")
    data = [make(folder / str(number), seed=number) for number in range(2)]
    for number in range(2):
        on_disk(folder / str(number))
    extents = [Extent(str(folder / str(n)), start, min(size, NBYTES - start)) for n, start, size in wanted]
    assert read_all(extents, 70_001) == b"".join(data[n][s : min(s + size, NBYTES)] for n, s, size in wanted)


@pytest.mark.parametrize("portion", [ALIGNMENT, 3 * ALIGNMENT, 5000, WINDOW_BYTES - 1])
def test_a_kernel_that_reads_less_than_asked_is_asked_again(
    direct: Path, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: real(fd, [into[0][:portion]], offset))
    found = read_all([Extent(str(direct), 0, NBYTES)])
    monkeypatch.undo()
    assert found == direct.read_bytes()


def failing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Reads past the cache fail from the second window on."""
    real: Preadv = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= WINDOW_BYTES and _is_direct(fd):
            raise OSError(code, os.strerror(code))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def _is_direct(fd: int) -> bool:
    flags = next(line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("flags"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_what_is_refused_past_the_cache_is_read_through_it(
    number: int, direct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, number)
    found = read_all([Extent(str(direct), 0, NBYTES)])
    monkeypatch.undo()
    assert found == direct.read_bytes()


def test_an_error_of_the_reader_is_raised(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, errno.EIO)
    with pytest.raises(FileAccessError, match="file"):
        read_all([Extent(str(direct), 0, NBYTES)])


@pytest.mark.parametrize("cold", [True, False])
def test_a_file_that_ends_too_early_is_reported(cold: bool, tmp_path: Path) -> None:
    make(tmp_path / "file")
    if cold:
        on_disk(tmp_path / "file")
    with pytest.raises(FileAccessError, match=f"ended at byte {NBYTES} "):
        read_all([Extent(str(tmp_path / "file"), NBYTES - 10, 20)])


def test_a_file_that_is_gone_is_reported_and_the_others_are_closed(tmp_path: Path) -> None:
    make(tmp_path / "file", 10)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileAccessError, match="gone"):
        Sources([Extent(str(tmp_path / "file"), 0, 1), Extent(str(tmp_path / "gone"), 0, 1)])
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_nobody_wants_to_read_is_not_opened(tmp_path: Path) -> None:
    with Sources([Extent(str(tmp_path / "gone"), 0, 0)]):
        pass


def test_an_unknown_file_system_is_read_through_the_cache(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt.engine.blocks.file_system", lambda path: "nfs4")
    calls = counted(monkeypatch)
    read_all([Extent(str(direct), 7, 100)])
    assert calls == [(7, 100)]


def test_a_file_counts_as_cached_where_linux_does_not_tell(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int | None:
        return ctypes.c_void_p(-1).value

    fd = os.open(direct, os.O_RDONLY)
    assert not is_cached(fd)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(mmap=refused))
    assert is_cached(fd)
    os.close(fd)


def test_an_empty_file_counts_as_cached(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert is_cached(fd)
    os.close(fd)
