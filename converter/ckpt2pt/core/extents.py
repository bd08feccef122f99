"""The nouns of the engine: an extent of a file, a view of a storage, a tensor that lies in files, and what an element weighs."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

DTYPE_BYTES: dict[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int4": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip
"""Bytes of one element as stored. MindSpore stores an ``int4`` element in a whole byte."""

FLOATS = frozenset({"float32", "bfloat16", "float16"})
"""Types that convert into each other exactly, or by rounding to nearest even on the way down."""


class Extent(NamedTuple):
    """``nbytes`` bytes of ``path`` from ``offset`` on."""

    path: str
    offset: int
    nbytes: int


Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""(origin, shape) of a part of a global tensor."""
S = TypeVar("S")


class View(NamedTuple, Generic[S]):
    """A box of a global tensor in a storage: element ``first`` is the box's first, ``strides`` are in elements."""

    origin: Shape
    shape: Shape
    strides: Shape
    first: int
    storage: S

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Stored = View[tuple[Extent, ...]]
"""A view whose storage lies in files: the bytes of its extents, joined in order."""


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes share; None for nothing."""
    low = tuple(map(max, one[0], other[0]))
    high = (min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    shape = tuple(stop - start for start, stop in zip(low, high, strict=True))
    return (low, shape) if min(shape, default=1) > 0 else None


class Gather(NamedTuple):
    """A box of a global tensor, wherever ``views`` hold its elements; what none of them holds is zero (padding)."""

    views: tuple[Stored, ...]
    box: Box

    @property
    def numel(self) -> int:
        """Elements that the views hold."""
        shared = (intersection((view.origin, view.shape), self.box) for view in self.views)
        return sum(math.prod(box[1]) for box in shared if box)


class TensorRef(NamedTuple):
    """Where a tensor lies; its payload has not been read.

    ``dtype`` is spelled as numpy and torch spell it (``float32``, ``bfloat16``); ``str`` marks a MindSpore
    string entry, and a name outside :data:`DTYPE_BYTES` a type nobody can convert. Elements are little-endian,
    in C order, and the extents joined in order are the payload. A tensor that is cut otherwise than the files are has
    ``gather`` instead of extents.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    gather: Gather | None = None

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        if self.gather:
            return self.gather.numel * DTYPE_BYTES[self.dtype]
        return sum(extent.nbytes for extent in self.extents)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that hold it."""
        storages = [view.storage for view in self.gather.views] if self.gather else [self.extents]
        return tuple(dict.fromkeys(extent.path for storage in storages for extent in storage))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"
