"""What is remembered for a while, and never more of it than a fixed number."""

from __future__ import annotations

from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def remember(found: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Keep a value by its key; what has been there longest goes where there would be more than ``most``."""
    found[key] = value
    while len(found) > most:
        del found[next(iter(found))]
