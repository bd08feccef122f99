"""Lock files: one holder, who is named; nothing that is no lock of ours is touched; no wait is without end or deaf."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, InterruptedRunError, TryAgainError, UsageError
from ckpt2pt.publish import host, locked
from ckpt2pt.publish import locks as module


def test_a_lock_that_cannot_be_made_is_an_error_with_a_hint_and_its_holders_name_is_a_courtesy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="opening the lock file"), locked(tmp_path, "working"):
        pass
    monkeypatch.setattr("os.pwrite", full)
    with locked(tmp_path / "lock", "working"):
        pass


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", ["symbolic", "hard", "dangling"])
def test_a_link_is_neither_followed_nor_emptied(kind: str, tmp_path: Path) -> None:
    source, path = tmp_path / "network.ckpt", tmp_path / "claim.lock"
    if kind != "dangling":
        source.write_bytes(b"weights")
    if kind == "hard":
        path.hardlink_to(source)
    else:
        path.symlink_to(source)
    with pytest.raises(UsageError, match=r"is (a symbolic link|not a lock file)"), locked(path, "working"):
        pass
    assert kind == "dangling" or source.read_bytes() == b"weights"
    assert source.exists() == (kind != "dangling")


@pytest.mark.parametrize("content", [b"weights", b"x" * 1000, b"host pid 7\nmore"])
def test_a_file_that_is_no_lock_of_ours_is_not_written(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "claim.lock"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a lock file"), locked(path, "working"):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("left", [b"", bytes(13), b"vm pid 7\n" + bytes(4)])
def test_what_a_power_failure_leaves_of_a_lock_file_is_one(left: bytes, tmp_path: Path) -> None:
    path = tmp_path / "claim.lock"
    path.write_bytes(left)
    with locked(path, "working"):
        assert path.read_text().endswith(f" pid {os.getpid()}\n")


def test_a_lock_file_is_one_at_every_moment_of_being_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, seen = tmp_path / "claim.lock", list[bytes]()
    path.write_bytes(b"a-host-of-a-much-longer-name pid 1234567\n")
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        seen.append(path.read_bytes())
        done = real(fd, data, offset)
        seen.append(path.read_bytes())
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with locked(path, "working"):
            pass
    assert len(seen) == 2
    for text in seen:
        (tmp_path / "copy.lock").write_bytes(text)
        with locked(tmp_path / "copy.lock", "working"):
            pass


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "claim.lock")
    with pytest.raises(UsageError, match="is not a lock file"), locked(tmp_path / "claim.lock", "working"):
        pass


def held(path: Path, holder: str) -> int:
    """The lock in the hands of somebody else."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, f"{holder}\n".encode())
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_a_wait_is_reported_with_the_holder_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.1)
    fd = held(tmp_path / "claim.lock", "node-7 pid 42")
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TryAgainError, match="another run is looking after it: node-7 pid 42"),
        locked(tmp_path / "claim.lock", "looking after it", wait=0.5),
    ):
        pass
    assert 0.4 < time.monotonic() - began < 5
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for {tmp_path / 'claim.lock'}: another run is looking after it: node-7 pid 42"
    ]
    os.close(fd)


def test_a_wait_heeds_a_signal_at_once(tmp_path: Path) -> None:
    fd = held(tmp_path / "claim.lock", "node-7 pid 42")
    calls: list[float] = []

    def heed() -> None:
        calls.append(time.monotonic())
        if len(calls) == 3:
            raise InterruptedRunError("stopped by SIGTERM", where="this run", hint="again")

    with (
        pytest.raises(InterruptedRunError),
        locked(tmp_path / "claim.lock", "working", wait=60, heed=heed),
    ):
        pass
    assert calls[-1] - calls[0] < 5
    os.close(fd)


@pytest.mark.parametrize("buried", [True, False], ids=["gone", "zombie"])
def test_workers_of_a_run_that_is_gone_are_waited_for(
    buried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, done.pid, os.WEXITED | (0 if buried else os.WNOWAIT))
    fd = held(tmp_path / "stage-000.lock", f"{host()} pid {done.pid}")
    monkeypatch.setattr(module, "ORPHAN_SECONDS", 0.3)
    with (
        pytest.raises(TryAgainError, match=rf"workers of a run that was killed \(.* pid {done.pid}\) are still ending"),
        locked(tmp_path / "stage-000.lock", "converting this stage"),
    ):
        pass
    monkeypatch.setattr(module, "ORPHAN_SECONDS", 60)
    monkeypatch.setattr(time, "sleep", lambda _: os.close(fd))
    with locked(tmp_path / "stage-000.lock", "converting this stage"):
        pass
    done.wait()


def test_a_lock_whose_file_was_replaced_while_it_was_waited_for_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claim.lock"
    path.touch()
    real, seen = module._try, list[int]()

    def replaced(fd: int, where: Path) -> bool | None:
        seen.append(os.fstat(fd).st_ino)
        if len(seen) == 1:
            path.rename(tmp_path / "away")
        return real(fd, where)

    monkeypatch.setattr(module, "_try", replaced)
    with locked(path, "working") as lock:
        assert os.fstat(lock.fd).st_ino == path.stat().st_ino != seen[0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_nothing_is_proved(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    with locked(tmp_path / "lock", "working") as lock:
        assert not lock.proved


def test_a_passing_lock_leaves_no_file(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "working", passing=True):
        assert (tmp_path / "lock").is_file()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fstat", "pread"])
def test_a_lock_file_that_cannot_be_read_is_an_error_with_its_path(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with (
            pytest.raises(FileAccessError, match="reading the lock file") as caught,
            locked(tmp_path / "lock", "working"),
        ):
            pass
    assert caught.value.where == str(tmp_path / "lock")
