"""What was read of files and may be asked for again: the newest, as far as memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key, together of at most ``most``; the newest one is kept whatever its size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], T], size: Callable[[T], int]) -> T:
        """The value of a key, by ``read`` where it is not there; ``size`` measures it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        found = read()
        self._kept[key] = found, size(found)
        while len(self._kept) > 1 and sum(nbytes for _, nbytes in self._kept.values()) > self._most:
            self._kept.popitem(last=False)
        return found
