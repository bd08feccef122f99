"""Take back an older result: its folder is renamed, then what is ours in it is removed, and nothing else.

iter_0000400  --rename-->  .iter_0000400.1f2e3d4c.removed  --> gone      what a killed run left is swept by the next
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ckpt2pt.errors import Ckpt2ptError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.paths import listing, status
from ckpt2pt.publish.files import STATE, is_partial, sync_folder
from ckpt2pt.publish.kinds import CLAIM, MERGED, is_record
from ckpt2pt.publish.ledger import Holdings

log = logging.getLogger("ckpt2pt")

REMOVED = ".removed"
_NFS = re.compile(r"\.nfs[0-9a-f]{16,}")
"""What the kernel's NFS client calls a removed file that a process has still open; it goes with that process."""


def records_of(state: Path) -> list[Path]:
    """Records that list files, in the order in which they have to be read: a name leaves the first for the second."""
    return [path for form in ("writing-*.json", "rank-*.json", MERGED) for path in listing(state, form)]


def files_below(folder: Path) -> Iterator[str]:
    """Everything below ``folder`` that is no folder, by its path from there; links are not followed."""
    for path in listing(folder):
        if _NFS.fullmatch(path.name):
            continue
        found = status(path, follow=False)
        if found is not None and stat.S_ISDIR(found.st_mode):
            yield from (f"{path.name}/{name}" for name in files_below(path))
        elif found is not None:
            yield path.name


def is_kept_by_us(name: str) -> bool:
    """Whether a path is that of a record, a lock or a temporary file of ours."""
    folder, _, last = name.rpartition("/")
    return is_record(last) if folder == STATE else is_partial(last)


def foreign(folder: Path, names: Iterable[str], held: Holdings) -> str | None:
    """The first of ``names`` that is there and not ours."""
    for name in names:
        if not is_kept_by_us(name) and not held.is_ours(name) and status(folder / name, follow=False):
            return name
    return None


def retire(folder: Path, held: Holdings | None = None) -> None:
    """Remove a result that is ours.  Its name is free when this returns; what is not ours in it stays, and is reported."""
    hidden = folder.with_name(f".{folder.name.lstrip('.').partition('.')[0]}.{os.urandom(4).hex()}{REMOVED}")
    try:
        folder.rename(hidden)
        sync_folder(hidden.parent)
    except OSError as error:
        raise access_error(error, folder, "removing an older result") from error
    remove_ours(hidden, held.at(hidden) if held else None)


def remove_ours(folder: Path, held: Holdings | None = None) -> None:
    """Remove files of ours, then their records, then empty folders.  What cannot be removed is reported and tried again next time."""
    try:
        names = list(files_below(folder))
        held = held or Holdings.of(folder, records_of(folder / STATE))
        kept = [name for name in names if not is_kept_by_us(name)]
        for name in kept:
            if held.is_ours(name):
                (folder / name).unlink(missing_ok=True)
        left = next((name for name in kept if status(folder / name, follow=False)), None)
        if left is not None:
            log.warning("%s stays: it holds %s, which ckpt2pt did not write", folder, left)
            return
        for name in sorted(names, key=lambda name: name.endswith(CLAIM)):
            (folder / name).unlink(missing_ok=True)
        for top, _, _ in os.walk(folder, topdown=False):
            with suppress(FileNotFoundError):
                Path(top).rmdir()
    except (OSError, Ckpt2ptError) as error:
        log.warning("%s could not be removed, and the next run will try again: %s", folder, error)
