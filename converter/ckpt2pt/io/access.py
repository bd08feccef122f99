"""What the operating system refuses, in the user's words: the only translation of an ``OSError``."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

from ckpt2pt.errors import (
    Ckpt2ptError,
    FileAccessError,
    MissingInputError,
    NoSpaceError,
    PermissionDeniedError,
    ReadOnlyVolumeError,
    TooManyFilesError,
    TryAgainError,
    UnsupportedFileSystemError,
    UsageError,
    VolumeTooSmallError,
    aside,
    field_of,
    ref,
)

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ESPIPE, errno.EXDEV})
"""A file system that answers so lacks what was asked for, however often it is asked."""

OBJECT_STORES = (
    "an object store needs a mount with a write cache (rclone: --vfs-cache-mode writes), "
    "or write to a local volume and copy the finished result"
)
"""What to do about a target that is no file system of its own."""

_NO_PATH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def ended(path: str | Path, offset: int) -> Ckpt2ptError:
    """The error for a file that is shorter than it was when it was examined."""
    return FileAccessError(
        f"the file ended at byte {offset} while it was being read",
        where=path,
        hint="make sure that nothing writes the file, copy it again if it is a copy, and run the same command again",
    )


def access_error(
    error: OSError, path: Path | str, doing: str, *, option: str = "", reading: bool = False
) -> Ckpt2ptError:
    """The user's error for a failed system call on ``path``.

    ``option`` names an input (:func:`ckpt2pt.errors.ref`): a path that is not there is then a missing input.  ``reading`` says that
    nothing was to be written; ``option`` implies it.
    What cannot pass by itself has an exit code that no Job retries.
    """
    path, number = Path(path), error.errno or 0
    reason = os.strerror(number) if number else str(error)
    again = "then run the same command again"
    if number in _NO_PATH or number in {errno.EISDIR, errno.EEXIST}:
        return _wrong_path(number, path, f"{doing} failed: {reason}", option)
    if number in {errno.EACCES, errno.EPERM}:
        return _denied(path, doing, writing=not (option or reading))
    if number == errno.EROFS:
        return ReadOnlyVolumeError(
            f"{doing} failed: the volume is mounted read-only",
            where=path,
            hint="mount it writable (readOnly of the volume), or choose another path; if it was writable before, "
            f"look for file system errors (dmesg); {again}",
        )
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpaceError(
            f"{doing} failed: {reason}",
            where=path,
            hint="make room on the target volume and run the same command again; what is finished is kept",
        )
    if number == errno.EFBIG:
        return VolumeTooSmallError(
            f"{doing} failed: the file is larger than the file system or the limit of this process (ulimit -f) allows",
            where=path,
            hint=f"raise the limit, or choose a volume for large files; {again}",
        )
    if number == errno.EMFILE:
        return TooManyFilesError(
            f"{doing} failed: this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files open, and has",
            where=path,
            hint=f"raise the limit (ulimit -n, LimitNOFILE of the container runtime), or lower {ref('workers.processes')}; {again}",
        )
    if number in UNSUPPORTED:
        return UnsupportedFileSystemError(
            f"{doing} failed: the file system cannot do this ({reason})",
            where=path,
            hint=f"choose another volume; {OBJECT_STORES}",
        )
    if number == errno.ENOMEM:
        return TryAgainError(
            f"{doing} failed: {reason}", where=path, hint=f"give more memory{aside('workers.resources')}, {again}"
        )
    cause, hint = _PASSING.get(
        number, (reason, "check that the volume is mounted and healthy (dmesg, log of its storage driver)")
    )
    cause = cause if cause == reason else f"{cause} ({reason})"
    return FileAccessError(f"{doing} failed: {cause}", where=path, hint=f"{hint}; {again}")


_MOUNT = "check the network and the server of this mount"
_PASSING = {
    errno.EIO: ("the device or the server behind this mount reported an error", "look for its cause (dmesg)"),
    errno.ESTALE: ("the file was removed or replaced on the server while it was open", "let whatever writes there end"),
    errno.ENOTCONN: ("the process that serves this mount has ended", "mount the volume again"),
    errno.ENODEV: ("the device has gone", "mount the volume again"),
    errno.ENXIO: ("the device has gone", "mount the volume again"),
    errno.ENFILE: ("the machine has too many files open", "raise fs.file-max of the node"),
    errno.EAGAIN: ("the file system stayed busy", _MOUNT),
    errno.ETIMEDOUT: ("the server of this mount does not answer", _MOUNT),
    errno.EHOSTDOWN: ("the server of this mount does not answer", _MOUNT),
    errno.EHOSTUNREACH: ("the server of this mount cannot be reached", _MOUNT),
    errno.ECONNREFUSED: ("the server of this mount refuses the connection", _MOUNT),
    errno.ECONNRESET: ("the server of this mount closed the connection", _MOUNT),
    errno.ETXTBSY: ("a running program uses the file", "stop it, or choose another path"),
    errno.EBUSY: ("another program holds the file or folder", "stop it"),
}
"""Causes that may pass, with what to do about them."""


def _wrong_path(number: int, path: Path, what: str, option: str) -> Ckpt2ptError:
    """The path itself is wrong: as an input it is missing; as an output something else is in its place."""
    field = field_of(option)
    if option and number == errno.EISDIR:
        what = "this is a folder, and a file is needed"
        return UsageError(what, where=path, hint=f"check {option}", field=field)
    if option:
        missing = number == errno.ENOENT
        what = "the file is not there" if missing else f"the path leads nowhere: {os.strerror(number)}"
        return MissingInputError(what, where=path, hint=f"check {option}", field=field)
    if number == errno.ENOENT:
        hint = "let nothing remove files or folders there meanwhile, and run the same command again"
        return FileAccessError(what, where=path, hint=hint)
    if number in {errno.ELOOP, errno.ENAMETOOLONG}:
        return UsageError(what, where=path, hint="choose another path; this one leads nowhere")
    hint = "a file stands where a folder is to be, or a folder where a file: choose another path, or move it away"
    return UsageError(what, where=path, hint=f"{hint}; then run the same command again")


def _denied(path: Path, doing: str, *, writing: bool) -> Ckpt2ptError:
    """Who owns what is closed to us, and how it is opened."""
    me = f"this process runs as uid {os.geteuid()}, gid {os.getegid()}"
    try:
        place, found = _barrier(path)
    except OSError:  # not even the root folder can be examined
        return PermissionDeniedError(f"{doing} failed: permission denied; {me}", where=path, hint="run as another user")
    kind, access = ("folder", "a+rx") if stat.S_ISDIR(found.st_mode) else ("file", "a+r")
    mode = stat.S_IMODE(found.st_mode)
    given = f"give this user write access to {place}" if writing else f"`chmod {access} {place}`"
    hint = f"run as uid {found.st_uid}{aside('workers.security.runAsUser')}, or let the owner {given}"
    if os.geteuid() in {0, found.st_uid}:
        hint += (
            "; where the mode allows it, the server (root_squash) or an attribute of the file (chattr +i) forbids it"
        )
    return PermissionDeniedError(
        f"{doing} failed: permission denied: the {kind} {place.name or place} belongs to uid {found.st_uid}, "
        f"gid {found.st_gid} and has mode {mode:04o}; {me}"
        + (" (MindSpore leaves its checkpoints at mode 0400)" if mode == 0o400 else ""),
        where=path,
        hint=hint,
    )


def _barrier(path: Path) -> tuple[Path, os.stat_result]:
    """What is closed to us: the file, or the folder above it that is the first one to be seen."""
    place = path.absolute()
    while True:
        try:
            return place, place.stat()
        except OSError:
            if place == place.parent:
                raise
            place = place.parent
