"""Read a document field by field and tell all that is wrong with it at once.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ckpt2pt.conversion.names import HINTS, NAME, fits
from ckpt2pt.conversion.spelling import in_document
from ckpt2pt.errors import UsageError, rendered

_NEVER = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a document."""

    field: str
    what: str
    hint: str


def refusal(findings: Sequence[Finding], where: str) -> UsageError:
    """One error for everything that is wrong."""
    if len(findings) == 1:
        [found] = findings
        return UsageError(f"{found.field} {found.what}".strip(), where=f"{where}: {found.field}", hint=found.hint)
    lines = "".join(f"\n  - {finding.field}: {finding.what}; {finding.hint}" for finding in findings)
    return UsageError(f"{len(findings)} fields are wrong:{lines}", where=where, hint="correct these fields")


class Fields:
    """One object of the document.  What is wrong with a field is noted, and a harmless value goes on."""

    def __init__(self, value: object, path: str, findings: list[Finding]) -> None:
        self.path = path
        self._findings = findings
        self._value: Mapping[str, object] = {}
        self.broken = value is not None and not isinstance(value, Mapping)
        if isinstance(value, Mapping):
            self._value = cast("Mapping[str, object]", value)
        elif self.broken:
            self.note("", "is not a mapping of fields", "write its fields below it, one on a line")

    def note(self, name: str, what: str, hint: str) -> None:
        """Keep what is wrong with a field."""
        field = ".".join(part for part in (self.path, name) if part)
        finding = Finding(field=field, what=rendered(what, in_document), hint=rendered(hint, in_document))
        if finding not in self._findings:
            self._findings.append(finding)

    def get(self, name: str) -> object:
        """The raw value; null is as good as absent, as it is for an API server."""
        return self._value.get(name)

    def items(self) -> list[tuple[str, object]]:
        """Every field that is there and not null."""
        return [(name, value) for name, value in self._value.items() if value is not None]

    def child(self, name: str) -> Fields:
        """An object inside this one; an empty one if it is not there."""
        return Fields(self.get(name), ".".join(part for part in (self.path, name) if part), self._findings)

    def children(self, name: str) -> list[Fields]:
        """The objects of a list; none where it is not there."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            self.note(name, f"is {value!r}", "write a list")
        items = cast("list[object]", value) if isinstance(value, list) else []
        path = ".".join(part for part in (self.path, name) if part)
        return [Fields(item, f"{path}[{number}]", self._findings) for number, item in enumerate(items)]

    def text(self, name: str, default: str) -> str:
        """A string that may become a path, a name or an argument: NUL and half a pair of surrogates never can."""
        value = self.get(name)
        if isinstance(value, str) and (plain := _NEVER.sub("_", value)) != value:
            self.note(name, f"is {value!r}", "leave out the character that no path and no name can have")
            return plain
        if value is None or isinstance(value, str):
            return default if value is None else value
        self.note(name, f"is {value!r}, and must be text", "put it in quotes")
        return default

    def name(self, field: str, pattern: str = NAME) -> str:
        """A text that fits ``pattern``, the name of an object by default; empty where there is none."""
        found = self.text(field, "")
        if found and not fits(pattern, found):
            self.note(field, f"is {found[:80]!r}", HINTS[pattern])
        return found

    def choice(self, name: str, default: str, *others: str) -> str:
        """One of a few words, the first of them by default."""
        value = self.get(name)
        if value is None or value in {default, *others}:
            return default if value is None else str(value)
        self.note(name, f"is {value!r}", f"write {' or '.join((default, *others))}")
        return default

    def flag(self, name: str) -> bool:
        """True or false, false by default."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.note(name, f"is {value!r}", "write true or false")
        return value is True

    def number(self, name: str, default: int, *, low: int = 1) -> int:
        """A whole number of at least ``low``."""
        found = self.optional(name, low=low)
        return default if found is None else found

    def optional(self, name: str, *, low: int = 1) -> int | None:
        """A whole number of at least ``low``, or None."""
        value = self.get(name)
        if value is None:
            return None
        if type(value) is int and value >= low:
            return value
        self.note(name, f"is {value!r}", f"write a whole number of at least {low}")
        return None

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers of at least 0, or None."""
        value = self.get(name)
        if value is None:
            return None
        items = cast("list[object]", value) if isinstance(value, list | tuple) else [None]
        if all(type(item) is int and item >= 0 for item in items):
            return tuple(cast("list[int]", items))
        self.note(name, f"is {value!r}", "write a list of whole numbers, as [62, 63]")
        return None
