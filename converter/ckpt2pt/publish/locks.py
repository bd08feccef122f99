"""Lock files: one holder at a time, who is named to whoever waits; released by the kernel, however the holder ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ckpt2pt.errors import TryAgainError, UsageError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.files import read_bytes, write_all
from ckpt2pt.publish.files import host

log = logging.getLogger("ckpt2pt")

WAIT_SECONDS = 60.0
"""For how long a lock that is held for a moment only is waited for (docs/operations.md)."""
ORPHAN_SECONDS = 20.0
"""For how long the workers of a run that was killed are waited for: they end with it (ckpt2pt.run.pool)."""
_TELL_SECONDS = 2.0
_POLL_SECONDS = 0.05
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_HOLDER = re.compile(rb"([^\n]{0,300}) pid (\d{1,10})\n?")
_MAX_BYTES = 400


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is held.  A worker process that is started with it holds it, too, until both have ended."""

    fd: int
    proved: bool
    """False on a file system without locks, where nobody can tell."""

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd  # noqa: PLC0415 - only where there are worker processes

        return _inherit, (DupFd(self.fd), self.proved)


class _Passed(Protocol):
    def detach(self) -> int: ...


def _inherit(fd: _Passed, proved: bool) -> Lock:
    return Lock(fd.detach(), proved)


@contextmanager
def locked(
    path: Path, what: str, *, wait: float = 0.0, heed: Callable[[], None] = lambda: None, passing: bool = False
) -> Generator[Lock]:
    """Hold a lock file; whoever is second waits for ``wait`` seconds and learns who is at it.

    ``heed`` is called while waiting, and raises when the run was asked to stop.  A ``passing`` lock file is removed behind.
    A file that is not a lock of ours is neither followed, emptied nor written.
    """
    with _waiting(path, what, wait, heed) as lock:
        # Only whoever is second reads it; a full disk is known by what needs the room.
        with suppress(OSError):
            # Emptied first: whoever opens it in between would find the end of a longer line behind ours.
            os.ftruncate(lock.fd, 0)
            write_all(lock.fd, memoryview(f"{host()} pid {os.getpid()}\n".encode()), 0)
        yield lock
        if passing:
            with suppress(OSError):
                path.unlink()


@contextmanager
def _waiting(path: Path, what: str, wait: float, heed: Callable[[], None]) -> Generator[Lock]:
    began, reported = time.monotonic(), False
    while True:
        fd = _open(path)
        try:
            if (proved := _try(fd, path)) is not None:
                if _is_still(fd, path):
                    yield Lock(fd, proved)
                    return
            else:
                waited, holder, orphans = time.monotonic() - began, *_holder(fd)
                whose = (
                    f"workers of a run that was killed ({holder}) are"
                    if orphans
                    else f"another run is {what}: {holder}"
                )
                if waited >= max(wait, ORPHAN_SECONDS if orphans else 0):
                    raise TryAgainError(
                        f"{whose}{' still ending' if orphans else ''}{f', for {waited:.0f} s' if waited > 1 else ''}",
                        where=path,
                        hint="wait for it to finish, or stop it; then run the same command again",
                    )
                if waited > _TELL_SECONDS and not reported:
                    reported = True
                    log.warning("waiting for %s: %s%s", path, whose, " still ending" if orphans else "")
        finally:
            os.close(fd)
        heed()
        time.sleep(_POLL_SECONDS)


def _open(path: Path) -> int:
    """The lock file, made if it is not there; nothing else is opened."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused(path, "is a symbolic link") from error
        raise access_error(error, path, "opening the lock file") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size > _MAX_BYTES:
            raise _refused(path, "is not a lock file of ckpt2pt")
        # A power failure may leave zeros in the place of what was written last.
        text = read_bytes(fd, _MAX_BYTES, 0).strip(b"\0")
        if text.strip() and not _HOLDER.fullmatch(text):
            raise _refused(path, "is not a lock file of ckpt2pt")
    except OSError as error:
        os.close(fd)
        raise access_error(error, path, "reading the lock file", reading=True) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refused(path: Path, what: str) -> UsageError:
    return UsageError(f"the lock file {what}", where=path, hint="look at what put it there, and remove it")


def _try(fd: int, path: Path) -> bool | None:
    """True when the lock is ours, False where there are no locks, None when another one has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        # A file system without locks: claim, fence and renames keep the result whole all the same.
        if error.errno in _NO_LOCKS:
            return False
        raise access_error(error, path, "locking") from error
    return True


def _is_still(fd: int, path: Path) -> bool:
    """Whether the name still leads to the file that we hold: the folder may have been replaced while we waited."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise access_error(error, path, "locking") from error


def _holder(fd: int) -> tuple[str, bool]:
    """Who holds a lock, and whether that process is gone, so that only workers of it are left."""
    found = None
    with suppress(OSError):
        found = _HOLDER.fullmatch(read_bytes(fd, _MAX_BYTES, 0))
    if not found:
        return "another process", False
    where, pid = found[1].decode(errors="replace"), int(found[2])
    return f"{where} pid {pid}", where == host() and _is_gone(pid)


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, also when nobody has asked for its exit code yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:1]
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()
    except OSError:
        return False
    return state in ([b"Z"], [b"X"])
