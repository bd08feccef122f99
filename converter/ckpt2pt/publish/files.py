"""Small files of ours on a target volume: written whole or not at all, synced, and read again with their seal."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ckpt2pt.errors import TryAgainError, UsageError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.files import read_all
from ckpt2pt.io.paths import listing, status
from ckpt2pt.io.records import MAX_RECORD_BYTES, OVERSIZED, Json, load, unseal

STATE = ".ckpt2pt"
PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(rf"\..+\.\d+-[0-9a-f]+\{PARTIAL}")
_NOT_SYNCED = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP})
"""How file systems say that they do not sync folders."""


def host() -> str:
    """Who we are, for whoever finds our lock: the pod's name, which its host name cuts short, else the machine's."""
    return os.environ.get("CKPT2PT_POD_NAME") or os.uname().nodename


def vanished(path: Path) -> TryAgainError:
    """The error for a temporary file of ours that somebody removed while we wrote it."""
    return TryAgainError(
        "the temporary file was removed while it was written: another run is at work here",
        where=path,
        hint="let the other run finish, or stop it; then run the same command again",
    )


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable.  Raises ``OSError``, but where the file system does not sync folders."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder at or below ``root``, and make every entry that leads to it durable, that of ``root`` too.

    The entries of folders that are there already are synced as well: whoever made them may have been killed before.
    A symbolic link below ``root`` is refused: what it leads to is not the target.
    """
    chain = [folder, *folder.parents]
    inside = chain[: chain.index(root)]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in reversed(inside):
            with suppress(FileExistsError):
                path.mkdir()
            refuse_link(path)
            if not stat.S_ISDIR(path.stat(follow_symlinks=False).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for path in inside:
            sync_folder(path.parent)
        # Nobody has to let us read the folder that holds the root.
        with suppress(PermissionError):
            sync_folder(root.absolute().parent)
    except OSError as error:
        raise access_error(error, folder, "making the folder") from error


def refuse_link(path: Path) -> None:
    """Refuse a symbolic link where a folder of ours is to be."""
    found = status(path, follow=False)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise UsageError(
            "this is a symbolic link, and nothing is written through it",
            where=path,
            hint="name the folder that it leads to as the target, or remove the link",
        )


def partial_name(path: Path) -> Path:
    """A name beside ``path`` that no reader of either framework picks up."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}{PARTIAL}")


def is_partial(name: str) -> bool:
    """Whether :func:`partial_name` made it."""
    return _PARTIAL_NAME.fullmatch(name) is not None


def publish_bytes(
    path: Path, data: bytes | Iterable[bytes], *, fence: Callable[[], None] | None = None, beside: Path | None = None
) -> None:
    """Write a small file, given whole or in pieces, whole or not at all.

    ``fence`` is asked when the temporary file is there and before it gets its name: whoever takes a folder over writes
    the claim first and removes temporary files then, so that one of the two is seen.  ``beside`` is a path whose folder
    holds the temporary file.
    """
    partial = partial_name(beside or path)
    try:
        with partial.open("xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        if fence:
            fence()
        partial.replace(path)
        sync_folder(path.parent)
    except FileNotFoundError as error:
        raise vanished(path) from error
    except OSError as error:
        raise access_error(error, path, "writing") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sweep_partials(folder: Path, name: str = "*") -> None:
    """Remove temporary files that were to become ``name``, a pattern; call with the lock of whoever writes it held."""
    for path in listing(folder, f".{name}.*{PARTIAL}"):
        if is_partial(path.name):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise access_error(error, path, "removing what a killed run left") from error


def read_record(path: Path) -> Json | None:
    """A sealed document; None when it is not there, or not as it was written."""
    return unseal(read_small(path))


def read_json(path: Path) -> Json | None:
    """A small document of anybody's; None when it is not there or not whole."""
    return load(read_small(path))


def read_small(path: Path, limit: int = MAX_RECORD_BYTES) -> bytes:
    """Nothing where there is no regular file: a named pipe would be waited for.  A larger file is :data:`OVERSIZED`, unread."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                return b""
            return OVERSIZED if found.st_size > limit else read_all(fd, limit)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""
    except OSError as error:
        raise access_error(error, path, "reading", reading=True) from error
