"""A disk that fills up at the n-th write, for real code that must leave nothing half done."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from ckpt2pt.errors import NoSpaceError


def fill(patch: pytest.MonkeyPatch, at: int) -> None:
    """From here on write number ``at`` and all after it find no room."""
    real, calls = os.pwrite, count()

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        in_memory = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        if not in_memory and next(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    patch.setattr(os, "pwrite", pwrite)


def fill_at_every_step(work: Callable[[], object], folder: Path) -> Iterator[int]:
    """Run ``work`` on a disk that fills up a little later each time, until it does not; yields after each failure."""
    for at in count():
        with pytest.MonkeyPatch.context() as patch:
            fill(patch, at)
            try:
                work()
            except NoSpaceError as error:
                hint = error.hint
            else:
                return
        assert "run the same command again" in hint
        assert not list(folder.rglob("*.partial")), f"write {at} left a temporary file"
        yield at
