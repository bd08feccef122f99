"""Megatron's tracker: the iteration that is loaded.  One that cannot be read counts as an error, never as none."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.publish.files import read_small

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_DIGITS = 18
_MAX_BYTES = 4096


def read_tracker(folder: Path) -> str:
    """What it says: digits or ``release``, or whatever else; empty only when there is none."""
    return read_small(folder / TRACKER, _MAX_BYTES).decode(errors="replace").strip()


def tracked(root: Path) -> int | None:
    """The iteration that it names; None without one, or when it says anything else."""
    named = read_tracker(root)
    return int(named) if named.isdecimal() and named.isascii() and len(named) <= _MAX_DIGITS else None
