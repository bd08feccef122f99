"""A queue in which each key waits at most once and is handled by one worker at a time, and groups of keys take turns."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

_FIRST_BACKOFF = 0.5
_LAST_BACKOFF = 120.0


class Turns(Generic[Item]):
    """Groups take turns, and within one the first comes first: one line for each group, so that a namespace with thousands of items holds up another's one by one item."""

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


class WorkQueue(Generic[Key]):
    """``add`` as often as something changes; ``get`` gives a key when it is due, ``done`` gives it back.

    A key that is added while it is handled is handled again afterwards.  Times are those of the running event loop.
    Of keys that are due, those of one group (the namespace) do not go before another's.
    """

    def __init__(self, group: Callable[[Key], Hashable]) -> None:
        self._group = group
        self._ready: Turns[tuple[float, Key]] = Turns()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._handled: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._counter = itertools.count()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due or will be."""
        return len(self._due)

    def ready(self, now: float) -> int:
        """Keys that are due already."""
        return sum(due <= now for due in self._due.values())

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Let it be due after ``delay`` seconds, or earlier if it is already."""
        due = asyncio.get_running_loop().time() + max(delay, 0.0)
        if self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._counter), key))
        self._wake.set()

    def retry(self, key: Key, at_least: float = 0.0) -> float:
        """Let it be due after a pause that doubles with each failure in a row; returns the pause."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(_FIRST_BACKOFF * 2.0 ** min(failures - 1, 16), _LAST_BACKOFF)
        pause = max(float(pause) * random.uniform(0.8, 1.2), at_least)
        self.add(key, pause)
        return pause

    def forget(self, key: Key) -> None:
        """It went well: the next failure is the first."""
        self._failures.pop(key, None)

    def discard(self, key: Key) -> None:
        """It is not wanted any more."""
        self._due.pop(key, None)
        self.forget(key)

    async def get(self) -> tuple[Key, float]:
        """The next key that is due, and for how many seconds it has been."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            while self._heap and self._heap[0][0] <= now:
                due, _, key = heapq.heappop(self._heap)
                self._ready.add(self._group(key), (due, key))
            while self._ready:
                due, key = self._ready.take()
                # Moved forward or discarded; or handled just now, and then `done` brings it back.
                if self._due.get(key) != due or key in self._handled:
                    continue
                del self._due[key]
                self._handled.add(key)
                return key, now - due
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._heap[0][0] - now if self._heap else None)

    def done(self, key: Key) -> None:
        """It has been handled."""
        self._handled.discard(key)
        if key in self._due:
            heapq.heappush(self._heap, (self._due[key], next(self._counter), key))
            self._wake.set()
