"""How flags are read, by every program of ours: wrong usage is an error with a hint, and numbers are within reason."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

from ckpt2pt.errors import UsageError

_MAX_NUMBER = 1 << 31
_MAX_PORT = 65535


class _Help(argparse.HelpFormatter):
    """Help in which every flag tells its default, in its own words or in ours; prepared lines stay as they are."""

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

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {path: "PATH", int: "N"}.get(cast("type", action.type), action.dest.upper())

    def add_argument(self, action: argparse.Action) -> None:
        """Room for the names of commands, which are indented further than options (python/cpython, argparse.py)."""
        super().add_argument(action)
        self._action_max_length += 2 * isinstance(action.choices, dict)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage, and with defaults in its help."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - argparse's own
        settings.setdefault("formatter_class", _Help)
        super().__init__(**settings)
        self._needed: list[argparse.Action] = []

    def format_help(self) -> str:
        """Usage in one line: what is required; the options follow with their meaning."""
        shown = [
            _named(action, value=True)
            for action in self._actions
            if action.required or action in self._needed or not action.option_strings
        ]
        self.usage = " ".join(["%(prog)s", *shown, "[OPTION ...]"])
        return super().format_help()

    def parse_known_args(  # type: ignore[override]  # the overloads of its stub say the same
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401 - argparse's own
    ) -> tuple[Any, list[str]]:
        """As argparse, but what is wrong comes before what is missing, which may be the same word misspelt.

        A parser refuses what it does not know itself: it knows what may have been meant.
        """
        self._needed = [action for action in self._actions if action.required]
        for action in self._needed:
            action.required = False
        try:
            found, unknown = super().parse_known_args(args, namespace)
        finally:
            for action in self._needed:
                action.required = True
        spec = getattr(found, "spec", None)  # has what the others would say
        missing = [_named(action) for action in self._needed if not spec and getattr(found, action.dest, None) is None]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`UsageError` that names the word that may have been meant."""
        choice = re.search(r"invalid choice: '([^']*)'", message)
        flags = re.findall(r"(?<= )-[^\s=]+", message) if message.startswith("unrecognized") else []
        near = ""
        if flags:
            near = nearest(flags[0], self._option_string_actions)
        elif choice:
            near = nearest(choice[1], {str(c) for action in self._actions for c in action.choices or ()})
        meant = f"did you mean {near}? " if near else ""
        raise UsageError(message, where=f"the command line of {self.prog}", hint=f"{meant}see {self.prog} --help")


def _named(action: argparse.Action, *, value: bool = False) -> str:
    """An option or a positional as the user knows it; with ``value``, as it is to be given."""
    name = "/".join(action.option_strings) or str(action.metavar or action.dest)
    if not value:
        return name
    if not action.option_strings:
        return f"[{name} ...]" if action.nargs == "*" else name
    return f"{action.option_strings[-1]} {action.metavar or ('PATH' if action.type is path else action.dest.upper())}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The one of ``known`` that may have been meant, or nothing.  Dashes in front and between words count little."""
    plain = {name.lstrip("-"): name for name in known}
    bare = word.lstrip("-").replace("_", "-")
    begun = [name for name in plain if bare and name.startswith(bare)]
    import difflib  # noqa: PLC0415 - only on the way to an error

    found = difflib.get_close_matches(bare, begun or plain, 1, cutoff=0.0 if begun else 0.6)
    return next((plain[name] for name in found), "")


def examples(program: str, lines: Mapping[str, str]) -> str:
    """The examples of a program's help: what each does, and its command line, broken as a shell reads it."""
    shown = ["examples:"]
    for about, words in lines.items():
        kept = re.sub(r" (?!-)", "\0", words)  # an option and its value stay in one line
        broken = textwrap.wrap(f"{program} {kept}", 74, break_on_hyphens=False, break_long_words=False)
        shown += [f"  # {about}", "  " + " \\\n      ".join(broken).replace("\0", " ")]
    return "\n".join(shown)


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


def factor(text: str) -> float:
    """A number above 0, for ``type=``."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found <= _MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return found


def port(text: str) -> int:
    """A port of TCP, for ``type=``."""
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {_MAX_PORT}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
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
                hint=f"give {flag} a number above 0, at most {_MAX_NUMBER}",
            )


class Group(Protocol):
    """A parser, or a group of its flags."""

    def add_argument(self, *names: str, **settings: Any) -> object:  # noqa: ANN401 - argparse's own
        """Add one flag."""
        ...


def add_target_sizes(group: Group, identity_options: str) -> None:
    """The parallel sizes of a result in another layout; ``identity_options`` is what follows the name of a size, ``{}`` its field."""
    for flag, what, field in (
        ("--target-tp-size", "tensor parallel size", "tensor"),
        ("--target-pp-size", "pipeline parallel size", "pipeline"),
        ("--target-vpp-size", "model chunks of each stage", "virtualPipeline"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=f"{what} {identity_options.format(field)}")


def target_sizes(options: argparse.Namespace) -> dict[str, int | None]:
    """By flag, what was given of them."""
    return {
        "--target-tp-size": options.target_tp_size,
        "--target-pp-size": options.target_pp_size,
        "--target-vpp-size": options.target_vpp_size,
        "--target-ep-size": getattr(options, "target_ep_size", None),
    }
