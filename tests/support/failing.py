"""A file system on which one call fails: every call that a program makes below a folder is counted, and the n-th one refused."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

_BY_PATH = (
    "stat",
    "lstat",
    "open",
    "listdir",
    "scandir",
    "mkdir",
    "rmdir",
    "unlink",
    "statvfs",
    "readlink",
    "rename",
    "replace",
)
_BY_DESCRIPTOR = ("fstat", "read", "pread", "preadv", "write", "pwrite", "fsync", "ftruncate", "fchmod")


@dataclass
class Failing:
    """Counts calls below ``root``; the call number ``fails`` (from 1 on) ends with the error ``number``."""

    root: Path
    fails: int = 0
    number: int = errno.EIO
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def _meet(self, name: str, path: object) -> None:
        where = path if isinstance(path, int) else os.fsdecode(os.fspath(path))  # type: ignore[call-overload]
        if isinstance(where, int):
            with suppress(OSError):
                where = _readlink(f"/proc/self/fd/{where}")
        if not isinstance(where, str) or not (where == str(self.root) or where.startswith(f"{self.root}/")):
            return
        self.calls.append((name, where.removeprefix(f"{self.root}/")))
        if len(self.calls) == self.fails:
            raise OSError(self.number, os.strerror(self.number), *(() if isinstance(path, int) else (path,)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args and args[0] is not None:
                self._meet(name, args[-1] if name in {"rename", "replace"} else args[0])
            return real(*args, **kwargs)

        return call

    @contextmanager
    def at_work(self) -> Generator[None]:
        """Every call in the block is counted."""
        with ExitStack() as stack:
            for name in (*_BY_PATH, *_BY_DESCRIPTOR):
                stack.enter_context(patch.object(os, name, self._wrapped(name, getattr(os, name))))
            stack.enter_context(patch.object(fcntl, "flock", self._wrapped("flock", fcntl.flock)))
            stack.enter_context(patch.object(io, "open", self._wrapped("open", io.open)))
            yield


_readlink = os.readlink
