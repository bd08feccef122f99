"""How flags are read, by every program of ours: wrong usage is an error with a mend, and numbers are within reason."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from ckpt2pt.errors import UsageError

_MAX_NUMBER = 1 << 31
_MAX_PORT = 65535


class _Help(argparse.HelpFormatter):
    """Help in which every flag tells its default, in its own words or in ours."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", cast("object", action.default)
        if not action.option_strings or value in (None, [], argparse.SUPPRESS) or value is False or "default" in text:
            return text
        shown = (
            " ".join(map(str, cast("list[object]", value)))
            if isinstance(value, list)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
        return f"{text}; default {shown.replace('%', '%%')}"


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage, and with defaults in its help."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        settings.setdefault("formatter_class", _Help)
        super().__init__(**settings)
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]  # the overloads of its stub say the same
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401 - argparse's own
    ) -> tuple[Any, list[str]]:
        """As argparse, but what a parser does not know is refused by itself, which knows what may have been meant."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`UsageError`; a misspelt option comes before one that is missing, as it may be the same."""
        flags = (word.partition("=")[0] for word in self._words if word.startswith("--") and word != "--")
        unknown = [flag for flag in flags if flag not in self._option_string_actions]
        choice = re.search(r"invalid choice: '([^']*)'", message)
        near = ""
        if unknown and "arguments are required" in message:
            message = f"unrecognized arguments: {' '.join(unknown)}"
        if unknown and message.startswith("unrecognized"):
            near = _nearest(unknown[0], self._option_string_actions)
        elif choice:
            near = _nearest(choice[1], {str(c) for action in self._actions for c in action.choices or ()})
        meant = f"did you mean {near}? " if near else ""
        raise UsageError(message, where=f"the command line of {self.prog}", mend=f"{meant}see {self.prog} --help")


def _nearest(word: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def path(text: str) -> Path:
    """A path, for ``type=``; an empty one would be the folder that the command happens to run in."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; write . for the current folder")
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise argparse.ArgumentTypeError(f"{text!r} holds a character that no path can have")
    return Path(text)


def seconds(text: str) -> float:
    """A time of 0 or more, for ``type=``."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= _MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_MAX_NUMBER}")
    return found


def port(text: str) -> int:
    """A port of TCP, for ``type=``."""
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {_MAX_PORT}")
    return int(text)


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


def add_target_sizes(group: argparse._ArgumentGroup, meaning: str) -> None:
    """The parallel sizes of a result in another layout; ``meaning`` is what follows the name of a size, ``{}`` its field."""
    for flag, what, field in (
        ("--target-tp-size", "tensor parallel size", "tensor"),
        ("--target-pp-size", "pipeline parallel size", "pipeline"),
        ("--target-vpp-size", "model chunks of each stage", "virtualPipeline"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=f"{what} {meaning.format(field)}")


def target_sizes(options: argparse.Namespace) -> dict[str, int | None]:
    """By flag, what was given of them."""
    return {
        "--target-tp-size": options.target_tp_size,
        "--target-pp-size": options.target_pp_size,
        "--target-vpp-size": options.target_vpp_size,
    }
