"""Plain text for people: aligned columns, human sizes, short forms of values, and whole documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from ckpt2pt.errors import MARKER, printable, size, spelled

Document = Mapping[str, object]
"""Plain JSON: facts, groups of facts, and tables (lists of rows)."""


_COUNTS = frozenset({"elements", "parameters", "tensors", "files", "buckets"})


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Lines with aligned columns, those numbered in ``right`` flush right.  Nothing without rows, no column without cells."""
    body = [tuple(printable(str(cell)) for cell in row) for row in rows]
    kept = [column for column in range(len(head)) if any(row[column] for row in body)]
    cells = [[row[column] for column in kept] for row in (head, *body)] if body else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, kept, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in cells]


def warned(texts: Iterable[object]) -> list[str]:
    """A line for each warning, and those below it; options that it names are left to the edge to spell."""
    return [f"warning: {''.join(_shown(part) for part in MARKER.split(str(text)))}" for text in texts]


def _shown(part: str) -> str:
    return part if MARKER.fullmatch(part) else spelled(part)


def short(value: object, limit: int = 60) -> str:
    """``repr`` of a value on one line, cut when it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def render(document: Document) -> str:
    """A document as text: facts, then groups, then tables."""
    lines = [f"{document['kind']}  {printable(str(document['path']))}"]
    facts = {
        key: value
        for key, value in document.items()
        if key not in {"kind", "path"} and not isinstance(value, dict | list)
    }
    lines += table(("", ""), [(_words(key), _cell(key, value)) for key, value in facts.items()])[1:]
    for key, value in document.items():
        if key == "doubts":  # conflicts by their older name, for programs
            continue
        if isinstance(value, list) and value:
            lines += ["", _words(key), *_render_list(cast("list[object]", value))]
        elif isinstance(value, dict) and value:
            lines += ["", *_render_group(_words(key), cast("Document", value))]
    return "\n".join(lines)


def _render_list(rows: list[object]) -> list[str]:
    if not isinstance(rows[0], dict):
        return [f"  {printable(str(row))}" for row in rows]
    found = cast("list[Document]", rows)
    head = list(dict.fromkeys(key for row in found for key in row))
    numbers = {column for column, key in enumerate(head) if all(_is_number(row.get(key)) for row in found)}
    cells = ([_cell(key, row.get(key, "")) for key in head] for row in found)
    return [f"  {line}" for line in table([_words(key) for key in head], cells, right=frozenset(numbers))]


def _render_group(title: str, group: Document) -> list[str]:
    plain = {key: value for key, value in group.items() if not isinstance(value, dict)}
    lines = [title, *(f"  {line}" for line in table(("", ""), [(key, _cell(key, v)) for key, v in plain.items()])[1:])]
    for key, value in group.items():
        if isinstance(value, dict):
            inner = cast("Document", value)
            lines += [
                f"  {printable(str(key))}",
                *(f"    {line}" for line in table(("", ""), [(k, short(v)) for k, v in inner.items()])[1:]),
            ]
    return lines


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "bytes" and isinstance(value, int):
        return size(value)
    if key in _COUNTS and isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def _words(key: str) -> str:
    return re.sub(r"(?<=[a-z])[A-Z]", lambda found: f" {found[0].lower()}", key)


def checksums_reported(found: Mapping[str, int]) -> str:
    """For a person; nothing where no file states a checksum."""
    forms = {
        "verified": "{} verified",
        "notChecked": "{} not checked (only a part of the file is read)",
        "none": "{} files state none",
    }
    if not found.get("verified") and not found.get("notChecked"):
        return ""
    return "\nsource checksums: " + ", ".join(form.format(found[key]) for key, form in forms.items() if found.get(key))


def conflicting(conflicts: Iterable[str] = ()) -> dict[str, list[str]]:
    """What contradicts the chosen iteration, in a document: by its name, and by the one that it had up to 0.1."""
    return {"conflicts": [*conflicts], "doubts": [*conflicts]}


def spans(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` -> ``0-2,5``."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"
