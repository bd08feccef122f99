"""What a target volume has and can: room, and the operations that writing a checkpoint needs; found before the first byte.

.ckpt2pt-probe.4711-8c0f.partial   created, written out of order, renamed, read, replaced by a rename, removed
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ckpt2pt.errors import UnsupportedFileSystemError, VolumeTooSmallError, size
from ckpt2pt.io.access import OBJECT_STORES, UNSUPPORTED, access_error
from ckpt2pt.io.files import read_bytes, write_all
from ckpt2pt.io.paths import listing

_PREFIX = ".ckpt2pt-probe."
_PAGE = 4096
_PAUSES = (0.1, 0.2, 0.4, 0.8, 0.0)
_REFUSALS = UNSUPPORTED | {errno.EINVAL, errno.EPERM, errno.EACCES, errno.EEXIST, errno.EBADF}
"""Answers to an operation on a file of our own, in a folder where we have just made it: the file system lacks it."""


def check_volume(folder: Path, needed: int, option: str, hint: str = "") -> None:
    """Refuse before the first byte what cannot fit, and a file system on which it cannot be written.

    ``folder`` need not be there yet; ``option`` names it in the user's words.
    """
    check_room(folder, needed, option, hint)
    probe(folder, option)


def check_room(folder: Path, needed: int, option: str, hint: str = "") -> None:
    """Refuse what cannot fit, as far as the file system tells how much room it has."""
    free = free_bytes(folder)
    if free is not None and needed > free:
        raise VolumeTooSmallError(
            f"{size(needed)} are needed, {size(free)} are free",
            where=folder,
            hint=f"free {size(needed - free)} there, or choose another {option}{hint}; then run the same command again",
        )


def free_bytes(folder: Path) -> int | None:
    """Room for this user on the volume that will hold ``folder``; None where the file system does not tell.

    Object-store and other FUSE mounts answer statfs(2) with zeros, which is not a full disk: that has blocks.
    """
    place = _nearest(folder)
    try:
        found = os.statvfs(place)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise access_error(error, place, "asking for free space", reading=True) from error
    return found.f_bavail * found.f_frsize if found.f_blocks and found.f_frsize else None


def probe(folder: Path, option: str) -> None:
    """Do once on a small file what a conversion does with each of its files.

    Raises :class:`UnsupportedFileSystemError` naming what the file system lacks.
    """
    place = _nearest(folder)
    _sweep(place)
    for pause in _PAUSES:
        try:
            _try_out(place, option)
        except FileNotFoundError as error:  # removed by a run that began just now and sweeps, as below
            if not pause:
                raise _lacks("find a file that was just written", error, place, option) from error
            time.sleep(pause)
        else:
            return


def _try_out(place: Path, option: str) -> None:
    stem = f"{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    first, second = place / f"{stem}.1.partial", place / f"{stem}.2.partial"
    data = b"1" * _PAGE + b"2" * _PAGE
    try:
        fd = _create(first)
        try:
            with _needs("write a file out of order", place, option):
                _lock(fd)
                write_all(fd, memoryview(data)[_PAGE:], _PAGE)
                write_all(fd, memoryview(data)[:_PAGE], 0)
        finally:
            with _needs("write a file out of order", place, option):
                os.close(fd)
        with _needs("rename a file", place, option):
            first.rename(second)
        with _needs("read a file that was just written", place, option):
            fd = os.open(second, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                found = b""
                while piece := read_bytes(fd, len(data), len(found)):
                    found += piece
            finally:
                os.close(fd)
        if found != data:
            raise _lacks("keep what is written out of order", None, place, option)
        os.close(_create(first))
        with _needs("replace a file by renaming another one to its name", place, option):
            first.rename(second)
    finally:
        for path in (first, second):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise access_error(error, path.parent, "creating a file") from error


@contextmanager
def _needs(ability: str, place: Path, option: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _REFUSALS:
            raise _lacks(ability, error, place, option) from error
        raise access_error(error, place, f"an attempt to {ability}") from error


def _lacks(ability: str, error: OSError | None, place: Path, option: str) -> UnsupportedFileSystemError:
    reason = f" ({os.strerror(error.errno)})" if error and error.errno else ""
    return UnsupportedFileSystemError(
        f"the file system there ({file_system(place) or 'of unknown type'}) cannot {ability}{reason}; nothing was written",
        where=place,
        hint=f"choose another volume with {option}; {OBJECT_STORES}",
    )


def _lock(fd: int) -> bool:
    """Show that the probe of this file goes on, as far as the file system has locks; False where another one shows it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _sweep(place: Path) -> None:
    """Remove what killed runs left behind here."""
    for path in listing(place, f"{_PREFIX}*.partial"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _lock(fd):
                    path.unlink()
            finally:
                os.close(fd)


def _nearest(folder: Path) -> Path:
    """The folder, or the first one above it that is there already."""
    place = folder.absolute()
    while True:
        try:
            place.stat()
        except (FileNotFoundError, NotADirectoryError):
            place = place.parent
        except OSError as error:
            raise access_error(error, place, "examining") from error
        else:
            return place


def file_system(path: Path) -> str | None:
    """Type of the file system that holds ``path``, as ``mount`` calls it; None where Linux does not tell."""
    try:
        return _file_system(path.stat().st_dev)
    except OSError:
        return None


@lru_cache(64)
def _file_system(device: int) -> str | None:
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    number = f"{os.major(device)}:{os.minor(device)}"
    # 36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/root rw (proc_pid_mountinfo(5))
    for line in table.splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2:3] == [number]:
            return kind.split(" ", 1)[0]
    return None
