"""Put a complete result in the place of an older one.

Megatron    iter_N and .iter_N.ID.new exchange their names in one step (renameat2), or in two where the system has no such
            call: iter_N -> .iter_N.ID.old, .iter_N.ID.new -> iter_N.  Between them the next run finds both, and goes on.
MindSpore   the folder is the user's own, so the files move one by one; the claim says so first, and the next run goes on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from ckpt2pt.errors import UsageError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.paths import is_there, listing, status
from ckpt2pt.io.records import Json, seal
from ckpt2pt.publish.files import STATE, make_folder, publish_bytes, read_record, sync_folder
from ckpt2pt.publish.kinds import CLAIM
from ckpt2pt.publish.ledger import Holdings, not_ours
from ckpt2pt.publish.retire import records_of, remove_ours

NEW, OLD = ".new", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM})


def exchange(new: Path, place: Path) -> Path:
    """Give the folder ``new`` the name of ``place``; returns where the older one is then."""
    old = new.with_name(new.name.removesuffix(NEW) + OLD)
    try:
        if _exchanged(new, place):
            sync_folder(place.parent)
            return new
        place.rename(old)
        sync_folder(place.parent)
        try:
            new.rename(place)
        except OSError:
            old.rename(place)
            raise
        sync_folder(place.parent)
    except OSError as error:
        raise access_error(error, place, "replacing") from error
    return old


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number))


def recover(place: Path) -> None:
    """Finish an exchange in two steps that was killed between them: the newer result, which is complete, takes the name."""
    if is_there(place):
        return
    for old in listing(place.parent, f".{place.name}.*{OLD}"):
        new = old.with_name(old.name.removesuffix(OLD) + NEW)
        try:
            with suppress(FileNotFoundError):  # another run was faster
                (new if is_there(new) else old).rename(place)
            sync_folder(place.parent)
        except OSError as error:
            raise access_error(error, place, "finishing a replacement that was killed") from error
        return


def begin_moving(home: Path, state: Path, new: Path, claim: Mapping[str, object], old: Holdings) -> Json:
    """Write the claim that says which files will move and which will go; from now on the move can only go forward."""
    names = [path.name for path in listing(new / STATE, "*.json")]
    going = [entry for name in old.listed for entry in old.entries(name)]
    coming = sorted(Holdings.of(new, records_of(new / STATE)).listed)
    swap = {"from": str(new.relative_to(home)), "records": names, "coming": coming, "files": going}
    document: Json = {**claim, "swap": swap}
    publish_bytes(state / CLAIM, seal(document))
    return document


def move(home: Path, state: Path, claim: Mapping[str, object], fence: Callable[[], None], hint: str) -> None:
    """Move the files one by one, then their records, then remove what the older result had besides."""
    swap = cast("Json", claim["swap"])
    new = home / str(swap["from"])
    old = Holdings.of(home, [swap])
    coming = Holdings.of(new, records_of(new / STATE))
    ours = Holdings(
        home,
        {name: [*old.listed.get(name, ()), *coming.listed.get(name, ())] for name in {*old.listed, *coming.listed}},
    )
    try:
        for name in sorted(coming.listed):
            if not is_there(new / name):
                continue  # moved by a run before this one
            if status(home / name, follow=False) and not ours.is_ours(name):
                raise not_ours(home / name, hint)
            make_folder((home / name).parent, home)
            fence()
            with suppress(FileNotFoundError):
                (new / name).replace(home / name)
            sync_folder((home / name).parent)
        wanted, kept = (set(cast("list[str]", swap[key])) for key in ("records", "coming"))
        for name in old.listed:
            if name not in kept and old.is_ours(name):
                fence()
                (home / name).unlink(missing_ok=True)
        for path in listing(state, "*.json"):
            if path.name not in wanted and path.name != CLAIM:
                path.unlink(missing_ok=True)
        for name in sorted(wanted - {CLAIM}):
            with suppress(FileNotFoundError):
                (new / STATE / name).replace(state / name)
        sync_folder(state)
    except OSError as error:
        raise access_error(error, home, "replacing") from error
    document = {key: value for key, value in claim.items() if key != "swap"}
    publish_bytes(state / CLAIM, seal(document), fence=fence)
    remove_ours(new)


def unfinished(state: Path) -> Json | None:
    """The claim of a move that was killed, if there is one."""
    claim = read_record(state / CLAIM)
    return claim if claim and isinstance(claim.get("swap"), dict) else None


def refuse_mount(place: Path) -> None:
    """A folder that is a mount of its own cannot be renamed, so that nothing can take its place."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    # 36 35 98:0 / /mnt rw,noatime shared:1 - ext4 /dev/root rw (proc_pid_mountinfo(5))
    mounts = {
        re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split()[4]) for line in table.splitlines()
    }
    if str(place.resolve()) in mounts:
        raise UsageError(
            "the folder is a mount of its own, so no other can take its place",
            where=place,
            hint="write into another target, or mount the folder above instead of this one",
        )
