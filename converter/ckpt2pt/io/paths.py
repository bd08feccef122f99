"""What stands at a path.  Only two errors mean "nothing"; any other is an error with the path, and never taken for absence.

pathlib's exists(), is_file(), is_dir() and glob() take others for it, which ones depends on Python's version (3.11 to 3.14).
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from pathlib import Path

from ckpt2pt.io.access import access_error

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})


def status(path: Path, option: str = "", *, follow: bool = True) -> os.stat_result | None:
    """What stands at ``path``, None only where nothing does.  ``option`` names it in the user's words."""
    try:
        return path.stat(follow_symlinks=follow)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise access_error(error, path, "examining", option=option, reading=True) from error


def is_there(path: Path, option: str = "") -> bool:
    """Whether anything stands at ``path``."""
    return status(path, option) is not None


def is_file(path: Path, option: str = "") -> bool:
    """Whether a regular file stands at ``path``."""
    found = status(path, option)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: Path, option: str = "") -> bool:
    """Whether a folder stands at ``path``."""
    found = status(path, option)
    return found is not None and stat.S_ISDIR(found.st_mode)


def listing(folder: Path, pattern: str = "*", option: str = "") -> list[Path]:
    """What a folder holds, sorted; nothing where there is no folder.  ``pattern`` may have several parts, ``a*/b*``."""
    first, _, rest = pattern.partition("/")
    try:
        names = sorted(name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, first))
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise access_error(error, folder, "listing", option=option, reading=True) from error
    found = [folder / name for name in names]
    return [inner for path in found for inner in listing(path, rest, option)] if rest else found
