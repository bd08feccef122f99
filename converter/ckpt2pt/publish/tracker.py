"""Megatron's tracker: the iteration that is loaded.  One that cannot be read counts as an error, never as none."""

from __future__ import annotations

import stat
from pathlib import Path

from ckpt2pt.errors import UsageError
from ckpt2pt.publish.files import read_small
from ckpt2pt.system.paths import status

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_DIGITS = 18
_MAX_BYTES = 4096
_QUOTED = 40


def read_tracker(folder: Path) -> str:
    """What it says: digits or ``release``, or whatever else; empty only when there is none."""
    return read_small(folder / TRACKER, _MAX_BYTES).decode(errors="replace").strip()


def tracked(root: Path) -> int | None:
    """The iteration that it names; None without one, or when it says anything else."""
    named = read_tracker(root)
    return int(named) if named.isdecimal() and named.isascii() and len(named) <= _MAX_DIGITS else None


def check_tracker(root: Path) -> None:
    """Refuse what is no regular file in its place, which a tracker would replace: a link, a folder, a pipe."""
    found = status(root / TRACKER, follow=False)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UsageError(
            "the tracker is not a regular file, and is not replaced",
            where=root / TRACKER,
            mend="look at what put it there, and move it away; then run the same command again",
        )


def replaced(root: Path, iteration: int) -> str:
    """The warning when ``iteration`` takes the place of what leads nowhere or is no iteration; empty otherwise."""
    said, named = read_tracker(root), tracked(root)
    if not said or (named is not None and named <= iteration):
        return ""
    what = (
        f"iteration {named}, which is not there" if named is not None else f"{said[:_QUOTED]!r}, which is no iteration"
    )
    what = "the release checkpoint" if said == "release" else what
    return f"the tracker named {what}; it names iteration {iteration} now"
