"""Who is next, when many wait: groups take turns, and within a group the first comes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """One line for each group, so that a namespace with thousands of items holds up another's one by one item."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Item]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, group: Hashable, item: Item) -> None:
        """Let it wait at the end of its group's line."""
        self._lines.setdefault(group, deque()).append(item)

    def take(self) -> Item:
        """The next one; its group is the last to be asked again.  StopIteration where nothing waits."""
        group = next(iter(self._lines))
        line = self._lines.pop(group)
        item = line.popleft()
        if line:
            self._lines[group] = line
        return item
