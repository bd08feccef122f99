"""The nouns of the engine: an extent of a file, a tensor that lies in extents, and what an element weighs."""

from __future__ import annotations

import math
from typing import NamedTuple

DTYPE_BYTES: dict[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int4": 1,
    "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2,
    "int32": 4, "uint32": 4, "float32": 4,
    "int64": 8, "uint64": 8, "float64": 8, "complex64": 8,
}  # fmt: skip
"""Bytes of one element as stored. MindSpore stores an ``int4`` element in a whole byte."""


class Extent(NamedTuple):
    """``nbytes`` bytes of ``path`` from ``offset`` on."""

    path: str
    offset: int
    nbytes: int


class TensorRef(NamedTuple):
    """Where a tensor lies; its payload has not been read.

    ``dtype`` is spelled as numpy and torch spell it (``float32``, ``bfloat16``); ``str`` marks a MindSpore
    string entry, and a name outside :data:`DTYPE_BYTES` a type nobody can convert. Elements are little-endian,
    in C order, and the extents joined in order are the payload.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return sum(extent.nbytes for extent in self.extents)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"
