"""System calls on files: complete whatever the kernel gives at a time, and reported in true words when they are refused."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ckpt2pt
from ckpt2pt import errors
from ckpt2pt.io import files
from ckpt2pt.io.files import OpenFiles, raise_file_limit, read_all, read_at, read_text, reserve, write_at

DATA = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# ------------------------------------------------------------------------------------------------------ reading, writing


def flaky(real: Callable[..., int]) -> Callable[..., int]:
    """A system call that is busy every other time, and takes three bytes at a time."""
    calls = iter(range(1_000_000))

    def call(fd: int, data: object, offset: int) -> int:
        if next(calls) % 2:
            raise BlockingIOError(errno.EAGAIN, "busy")
        part: object = [data[0][:3]] if isinstance(data, list) else data[:3]  # type: ignore[index]
        return real(fd, part, offset)

    return call


def test_short_and_busy_calls_are_continued(fd: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = bytearray(1000)
    monkeypatch.setattr(os, "preadv", flaky(os.preadv))
    monkeypatch.setattr(os, "pwrite", flaky(os.pwrite))
    read_at(fd, memoryview(into), 7, path)
    assert into == DATA[7:1007]
    write_at(fd, memoryview(into), 2, path)
    monkeypatch.undo()
    assert path.read_bytes() == DATA[:2] + DATA[7:1007] + DATA[1002:]


def test_a_small_file_is_read_whole_though_the_file_system_is_busy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.read, iter(range(1_000_000))

    def busy(fd: int, nbytes: int) -> bytes:
        if next(calls) % 2:
            raise BlockingIOError(errno.EAGAIN, "busy")
        return real(fd, min(nbytes, 7))

    monkeypatch.setattr(os, "read", busy)
    assert read_all(path) == DATA
    assert read_all(path, 10) == DATA[:10]


def test_text_may_have_any_line_ends(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a\r\nb\rö\n".encode())
    assert read_text(tmp_path / "text") == "a\nb\nö\n"


def test_what_comes_through_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"12345")
    os.close(writer)
    assert read_all(reader) == b"12345"
    os.close(reader)


def test_a_file_system_that_stays_busy_is_reported(fd: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "busy")

    monkeypatch.setattr(files, "_BUSY_SECONDS", 0.01)
    monkeypatch.setattr(os, "preadv", busy)
    with pytest.raises(errors.FileAccessError, match="stayed busy"):
        read_at(fd, memoryview(bytearray(8)), 0, path)


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(
    fd: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(errors.FileAccessError, match="writing failed"):
        write_at(fd, memoryview(b"x"), 0, path)


def test_a_file_that_ends_while_it_is_read_may_be_tried_again(fd: int, path: Path) -> None:
    with pytest.raises(errors.FileAccessError, match=f"ended at byte {len(DATA)} "):
        read_at(fd, memoryview(bytearray(10)), len(DATA) - 4, path)


_CALLS = re.compile(r"\bos\.(read|pread|preadv|write|pwrite|pwritev|writev|readv|sendfile|posix_fallocate)\(")


def test_no_other_module_reads_or_writes_a_descriptor() -> None:
    root = Path(ckpt2pt.__file__).parent
    found = {
        path.relative_to(root).as_posix(): match[0]
        for path in root.rglob("*.py")
        for match in _CALLS.finditer(path.read_text())
        if path != root / "system" / "files.py"
    }
    assert found == {}


# ------------------------------------------------------------------------------------------------------ reserving room


def test_room_is_reserved_in_slices_between_which_a_stop_is_noticed(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def fallocate(fd: int, offset: int, nbytes: int) -> int:
        calls.append((offset, nbytes))
        return 0

    def check() -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "fallocate", fallocate)
    with pytest.raises(KeyboardInterrupt):
        reserve(fd, 5 << 30, check)
    assert calls == [(0, 1 << 30), (1 << 30, 1 << 30)]


def test_what_is_reserved_is_there(fd: int, path: Path) -> None:
    reserve(fd, 1 << 20)
    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert path.read_bytes()[: len(DATA)] == DATA


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM], ids=errno.errorcode.get)
def test_without_fallocate_no_byte_is_written(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fallocate", lambda fd, offset, nbytes: number)
    fd = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT)
    reserve(fd, 8 << 20)
    os.close(fd)
    found = (tmp_path / "new").stat()
    assert (found.st_size, found.st_blocks) == (8 << 20, 0)


def test_a_full_disk_is_met_when_room_is_reserved(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fallocate", lambda fd, offset, nbytes: errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        reserve(fd, 1)


def test_an_interrupted_reservation_is_continued(fd: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, numbers = files.fallocate, iter([errno.EINTR])
    monkeypatch.setattr(files, "fallocate", lambda *args: next(numbers, 0) or real(*args))
    reserve(fd, 1 << 20)
    assert path.stat().st_size == 1 << 20


# ------------------------------------------------------------------------------------------------------ open files


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_few_files_are_open_however_many_are_read(tmp_path: Path) -> None:
    before = descriptors()
    with OpenFiles() as opened:
        for number in range(300):
            (tmp_path / str(number)).write_bytes(b"%d" % number)
        for number in (*range(300), *range(300)):
            (fd,) = opened.get(str(tmp_path / str(number)))
            assert files.read_bytes(fd, 9, 0) == b"%d" % number
            assert descriptors() <= before + 64
    assert descriptors() == before


def test_files_in_use_stay_open(tmp_path: Path) -> None:
    names = [str(tmp_path / str(number)) for number in range(200)]
    for name in names:
        Path(name).touch()
    with OpenFiles() as opened:
        first = opened.get(names[0])
        for name in names[1:]:
            opened.get(name, in_use={names[0]})
        assert opened.get(names[0]) == first


def test_the_limit_of_the_process_is_respected() -> None:
    """In a process of its own: limits cannot be raised again."""
    script = """
import os, resource
from ckpt2pt.io.files import OpenFiles, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 64))
raise_file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, 64)
others = [os.open("/", os.O_RDONLY) for _ in range(55)]
with OpenFiles(lambda path: (os.open(path, os.O_RDONLY), os.dup(0))) as opened:
    for number in range(300):
        opened.get("/proc/self/fd/../" + "./" * number + "stat")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_too_many_files_are_reported_with_the_limit(tmp_path: Path) -> None:
    def none_left(path: str) -> tuple[int, ...]:
        raise OSError(errno.EMFILE, path)

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with OpenFiles(none_left) as opened, pytest.raises(errors.TooManyFilesError, match=str(limit)):
        opened.get(str(tmp_path))


def test_the_limit_is_never_lowered() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
