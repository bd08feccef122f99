"""Plain text for people: aligned columns, human sizes, short forms of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """Lines with aligned columns; those numbered in ``right`` are set flush right.  Nothing when there are no rows."""
    cells = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    if len(cells) == 1:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return [line(row) for row in cells]


def size(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def short(value: object, limit: int = 60) -> str:
    """``repr`` of a value on one line, cut when it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
