"""How flags are read, by every program of ours: wrong usage is an error with a mend, and numbers are within reason."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import NoReturn

from ckpt2pt.errors import UsageError

_MAX_NUMBER = 1 << 31


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`UsageError`."""
        raise UsageError(message, where=f"the command line of {self.prog}", mend=f"see {self.prog} --help")


def counts(text: str) -> tuple[int, ...]:
    """``14,16,16,18`` as a tuple, for ``type=``."""
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,5") from None


def joined(parts: Iterable[tuple[int, ...]] | None) -> tuple[int, ...] | None:
    """The one list of a flag that takes several words of :func:`counts`; None where the flag is not given."""
    return None if parts is None else tuple(count for part in parts for count in part)


def check_numbers(given: Mapping[str, float | None]) -> None:
    """Refuse the first flag whose number is not above 0, not a number, or beyond reason."""
    for flag, number in given.items():
        if number is not None and not 0 < number <= _MAX_NUMBER:
            raise UsageError(
                f"{flag} is {number}",
                where="the command line",
                mend=f"give {flag} a number above 0, at most {_MAX_NUMBER}",
            )
