"""Decode a document into its types, and report all that is wrong with it at once.  Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from ckpt2pt.errors import UsageError, rendered
from ckpt2pt.kube.conversion.names import HINTS
from ckpt2pt.kube.conversion.spelling import in_document

T = TypeVar("T")
_MOST_FINDINGS = 32
_PLACE = re.compile(r"(.*?)(?: - at `\$(.*)`)?", re.DOTALL)
_WANTED = re.compile(r"Expected `([a-z]+)[^`]*`(?: (.*))?", re.DOTALL)
_KINDS = {
    "object": "a mapping of fields",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a document."""

    field: str
    what: str
    hint: str


def to_error(findings: Sequence[Finding], where: str) -> UsageError:
    """One error for everything that is wrong, in the words of the document."""
    findings = [
        replace(one, what=rendered(one.what, in_document), hint=rendered(one.hint, in_document)) for one in findings
    ]
    if len(findings) == 1:
        [found] = findings
        return UsageError(f"{found.field} {found.what}".strip(), where=f"{where}: {found.field}", hint=found.hint)
    lines = "".join(f"\n  - {finding.field}: {finding.what}; {finding.hint}" for finding in findings)
    return UsageError(f"{len(findings)} fields are wrong:{lines}", where=where, hint="correct these fields")


def decode(value: object, kind: type[T], path: str, findings: list[Finding]) -> T:
    """``value`` as a ``kind``, all of whose fields have defaults.  null is as good as absent, as it is for an API server.

    What is wrong is added to ``findings``, and the default takes its place.
    """
    rest = _without_nulls(value, kind)
    for _ in range(_MOST_FINDINGS):
        try:
            return msgspec.convert({} if rest is None else rest, kind)
        except msgspec.ValidationError as error:
            found = _PLACE.fullmatch(str(error))
            text, below = (found[1], found[2] or "") if found else (str(error), "")
            steps = re.findall(
                r"\.([^.\[]+)|\[(\d+)\]", below.partition("[...]")[0]
            )  # which key of a mapping is not reported
            parts = [name or int(number) for name, number in steps]
            wrong = _at(rest, parts)
            findings.append(Finding(field=path + below, what=_shown(wrong), hint=_hint(text, kind, parts)))
            rest = _removed(rest, parts)
    return msgspec.convert({}, kind)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "is a mapping of fields"
    return "is a list" if isinstance(value, list) else f"is {value!r}"[:90]


def _hint(text: str, kind: Any, parts: Sequence[str | int]) -> str:  # noqa: ANN401 - any type
    """What to write instead, from msgspec's own words."""
    if text.startswith("Invalid enum value"):
        return f"write {' or '.join(map(str, get_args(_kind_at(kind, parts))))}"
    wanted = _WANTED.match(text)
    if not wanted:
        return f"correct it: {text}"
    word, more = _KINDS.get(wanted[1], wanted[1]), wanted[2] or ""
    pattern = re.match(r"matching regex '(.*)'$", more, re.DOTALL)
    if pattern:
        known = pattern[1].encode().decode("unicode_escape").removesuffix(r"\Z") + "$"
        return HINTS.get(known, "write what the schema allows")
    if more.startswith("of length >= 1"):
        return "do not leave it empty"
    least = re.match(r">= (-?\d+)", more)
    most = re.match(r"(?:<= |of length <= )(\d+)", more)
    return f"write {word}" + (f" of at least {least[1]}" if least else f" of at most {most[1]}" if most else "")


def _kind_at(kind: Any, parts: Sequence[str | int]) -> Any:  # noqa: ANN401 - any type
    """The type of what lies at a path."""
    for part in parts:
        struct = _struct_in(kind) if isinstance(part, str) else None
        kind = _hints(struct)[str(part)] if struct else next(iter(get_args(kind)), kind)
    return next((one for one in (kind, *get_args(kind)) if get_origin(one) is Literal), kind)


def _at(value: object, parts: Sequence[str | int]) -> object:
    for part in parts:
        value = cast("Any", value)[part]
    return value


def _removed(value: object, parts: Sequence[str | int]) -> object:
    """A copy without what lies at a path; without its list, where that is one of several."""
    while parts and isinstance(parts[-1], int):
        parts = parts[:-1]
    if not parts:
        return {}
    found = deepcopy(value)
    del cast("Any", _at(found, parts[:-1]))[parts[-1]]
    return found


def _without_nulls(value: object, kind: object) -> object:
    """Free objects keep theirs: only fields of ``kind`` and of what is inside it are looked at."""
    struct = _struct_in(kind)
    if struct is None or not isinstance(value, Mapping):
        return value
    hints = _hints(struct)
    return {
        name: _without_nulls(item, hints.get(name))
        for name, item in cast("Mapping[str, object]", value).items()
        if item is not None or name not in hints
    }


def _struct_in(kind: object) -> type[msgspec.Struct] | None:
    """The type of an object with fields, optional or not; None for any other type."""
    options = (kind, *get_args(kind))
    return next((one for one in options if isinstance(one, type) and issubclass(one, msgspec.Struct)), None)


@cache
def _hints(struct: type[msgspec.Struct]) -> Mapping[str, object]:
    """The types of the fields by their names in a document."""
    hints = get_type_hints(struct)
    names = zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True)
    return {encoded: hints[name] for encoded, name in names}
