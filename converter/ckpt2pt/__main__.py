"""The entry points of our programs.

Nearly nothing is imported before a signal is listened to: one that comes during the imports ends the program like any other.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_TRY_AGAIN = 75


def main() -> int:
    """``ckpt2pt``."""
    return _enter("cli.commands", "main")


def kubectl() -> int:
    """``kubectl ckpt2pt``."""
    return _enter("cli.programs.kubectl", "kubectl")


def convert_ckpt2pt() -> int:
    """The reference's ``convert_ckpt2pt.py``."""
    return _enter("cli.programs.scripts", "convert_ckpt2pt")


def convert_pt2ckpt() -> int:
    """The reference's ``convert_pt2ckpt.py``."""
    return _enter("cli.programs.scripts", "convert_pt2ckpt")


def combine_ckpt_dp_zero() -> int:
    """The reference's ``combine_ckpt_dp_zero.py``."""
    return _enter("cli.programs.scripts", "combine_ckpt_dp_zero")


def _enter(module: str, program: str) -> int:
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _settle_streams()
        from importlib import import_module  # noqa: PLC0415

        code: int = getattr(import_module(f"ckpt2pt.{module}"), program)()
    except KeyboardInterrupt:
        sys.stderr.write(
            "ckpt2pt: stopped by a signal\n  where: before the first command\n  hint:  run the same command again\n"
        )
        code = _TRY_AGAIN
    # All is said and done, and only Python itself has still to leave.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return code


class _NoProgress(io.FileIO):
    """A stream of logs and progress: the work does not fail because nobody reads them, or for want of room for them."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _settle_streams() -> None:
    """Standard streams that are there, can spell every path, and stand in nobody's way."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, so that the next file to be opened would take its place
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))
    cast("io.TextIOWrapper", sys.stdout).reconfigure(errors="backslashreplace")
    raw = io.BufferedWriter(_NoProgress(sys.stderr.fileno(), "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


if __name__ == "__main__":
    sys.exit(main())
