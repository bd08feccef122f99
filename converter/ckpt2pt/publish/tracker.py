"""Megatron's tracker: the iteration that is loaded.  One that cannot be read counts as an error, never as none."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable
from pathlib import Path

from ckpt2pt.core.foldernames import (
    RELEASE,
    TRACKER,
    any_iteration_of,
    iteration_name,
    iteration_of,
    mindformers_iteration_name,
    tracked_name,
)
from ckpt2pt.errors import UsageError
from ckpt2pt.io.paths import listing, status
from ckpt2pt.publish.files import STATE, publish_bytes, read_small
from ckpt2pt.publish.kinds import REPORT

log = logging.getLogger("ckpt2pt")

_MAX_BYTES = 4096
_QUOTED = 40


def read_tracker(folder: Path) -> str:
    """What it says: digits or ``release``, or whatever else; empty only when there is none."""
    return read_small(folder / TRACKER, _MAX_BYTES).decode(errors="replace").strip()


def tracked(root: Path) -> int | None:
    """The iteration that it names; None without one, or when it says anything else."""
    return iteration_of(tracked_name(read_tracker(root)))


def check_tracker(root: Path) -> None:
    """Refuse what is no regular file in its place, which a tracker would replace: a link, a folder, a pipe."""
    found = status(root / TRACKER, follow=False)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise UsageError(
            "the tracker is not a regular file, and is not replaced",
            where=root / TRACKER,
            hint="look at what put it there, and move it away; then run the same command again",
        )


def announce(root: Path, iteration: int, *, beside: Path, fence: Callable[[], None], alone: bool) -> None:
    """Have the tracker name ``iteration``; call with its lock held, which proves that nobody else writes it if ``alone``."""
    path, seen = root / TRACKER, status(root / TRACKER)
    if warning := replaced(root, iteration):
        log.warning("%s: %s", path, warning)
    publish_bytes(path, str(iteration).encode(), fence=fence, beside=beside)
    later = None if alone else _later(root, iteration, seen.st_mtime_ns if seen else 0)
    if later is not None:
        publish_bytes(path, str(later).encode(), fence=fence, beside=beside)


def _later(root: Path, iteration: int, since: int) -> int | None:
    """The last iteration above ``iteration`` that was completed after ``since``, the time of the tracker that was replaced.

    Without locks its run may have written the tracker while we did; it has written its report before.  One that was
    completed before that tracker was written is not meant: somebody went back.
    """
    found: list[int] = []
    for folder in listing(root, "iter*"):
        number = any_iteration_of(folder.name)
        if number is None or folder.name not in {iteration_name(number), mindformers_iteration_name(number)}:
            continue
        if number > iteration:
            report = status(folder / STATE / REPORT)
            found += [number] if report and report.st_mtime_ns >= since else []
    return max(found, default=None)


def replaced(root: Path, iteration: int) -> str:
    """The warning when ``iteration`` takes the place of what leads nowhere or is no iteration; empty otherwise."""
    said, named = read_tracker(root), tracked(root)
    if not said or (named is not None and named <= iteration):
        return ""
    what = (
        f"iteration {named}, which is not there" if named is not None else f"{said[:_QUOTED]!r}, which is no iteration"
    )
    what = "the release checkpoint" if said == RELEASE else what
    return f"the tracker named {what}; it names iteration {iteration} now"
