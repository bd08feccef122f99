"""Room and abilities of a target volume: found before the first byte, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt2pt import errors
from ckpt2pt.io.volume import check_room, check_volume, file_system, free_bytes, probe

OPTION = "--megatron-path"


# ------------------------------------------------------------------------------------------------------ room


def test_room_is_asked_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet")
    assert free
    check_room(tmp_path, 1, OPTION)
    with pytest.raises(errors.VolumeTooSmallError, match="are needed") as caught:
        check_room(tmp_path, 2 * free + 1, OPTION)
    assert "--megatron-path" in caught.value.hint
    assert not list(tmp_path.iterdir())


def statvfs(blocks: int, available: int) -> Callable[[object], SimpleNamespace]:
    return lambda _: SimpleNamespace(f_blocks=blocks, f_bavail=available, f_frsize=4096)


def test_a_file_system_that_answers_zeros_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(0, 0))
    assert free_bytes(tmp_path) is None
    check_volume(tmp_path, 1 << 60, OPTION)


def test_a_full_file_system_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(1000, 0))
    with pytest.raises(errors.VolumeTooSmallError, match="1 B are needed, 0 B are free"):
        check_volume(tmp_path, 1, OPTION)


def failing(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(("number", "known"), [(errno.ENOSYS, False), (errno.EIO, True)], ids=["ENOSYS", "EIO"])
def test_room_that_cannot_be_asked_for(
    number: int, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", failing(number))
    if known:
        with pytest.raises(errors.FileAccessError):
            free_bytes(tmp_path)
    else:
        assert free_bytes(tmp_path) is None


# ------------------------------------------------------------------------------------------------------ abilities


def out_of_order(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            if offset != os.fstat(fd).st_size:
                raise OSError(number, os.strerror(number))
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)

    return patch


def no_rename(number: int, *, over: bool) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.rename

        def rename(source: Path, target: Path) -> None:
            if not over or Path(target).exists():
                raise OSError(number, os.strerror(number))
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)

    return patch


def wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that writes everything at the end, and says nothing."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data, os.fstat(fd).st_size))


LACKS = {
    "out of order, rclone": (out_of_order(errno.ESPIPE), "write a file out of order"),
    "out of order, mountpoint-s3": (out_of_order(errno.EINVAL), "write a file out of order"),
    "out of order, goofys": (out_of_order(errno.ENOTSUP), "write a file out of order"),
    "out of order, in silence": (wrong_place, "keep what is written out of order"),
    "no rename": (no_rename(errno.ENOSYS, over=False), "rename a file"),
    "no rename, reported as a permission": (no_rename(errno.EPERM, over=False), "rename a file"),
    "no rename over": (no_rename(errno.EEXIST, over=True), "replace a file"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_the_file_system_lacks_is_reported_in_a_sentence(
    lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, words = LACKS[lack]
    patch(monkeypatch)
    with pytest.raises(errors.UnsupportedFileSystemError, match=f"file system there .* cannot {words}") as caught:
        probe(tmp_path / "out", OPTION)
    assert OPTION in caught.value.hint
    assert "uid" not in str(caught.value)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, errors.FileAccessError), (errno.ENOSPC, errors.NoSpaceError)],
    ids=["EIO", "ENOSPC"],
)
def test_what_may_pass_is_no_lack(
    number: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", failing(number))
    with pytest.raises(kind):
        probe(tmp_path, OPTION)
    assert not list(tmp_path.iterdir())


def test_a_good_file_system_is_left_as_it_was(tmp_path: Path) -> None:
    probe(tmp_path / "not" / "yet", OPTION)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.UsageError, match="Not a directory"):
        probe(tmp_path / "file" / "below", OPTION)


def test_a_file_system_without_locks_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    (tmp_path / ".ckpt2pt-probe.1-a.1.partial").touch()
    probe(tmp_path, OPTION)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_probe_left_is_swept_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from ckpt2pt.io import volume
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
volume.probe(Path(sys.argv[1]), "--x")
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    used = tmp_path / ".ckpt2pt-probe.1-a.1.partial"
    with used.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        probe(tmp_path, OPTION)
        assert list(tmp_path.iterdir()) == [used]
    probe(tmp_path, OPTION)
    assert not list(tmp_path.iterdir())


def test_a_probe_that_another_run_swept_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.rename, iter(range(100))

    def rename(source: Path, target: Path) -> None:
        if next(calls) < 2:
            Path(source).unlink()
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    probe(tmp_path, OPTION)
    assert not list(tmp_path.iterdir())


def test_many_probes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                probe(tmp_path, OPTION)
        except BaseException as error:  # noqa: BLE001 - whatever it is
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(tmp_path.iterdir())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".ckpt2pt-probe.1-a.1.partial").symlink_to(tmp_path / "precious")
    probe(tmp_path, OPTION)
    assert (tmp_path / "precious").read_text() == "x"


def test_kernel_file_systems_go_by_their_names(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    assert file_system(tmp_path / "nothing") is None
