"""Entries of a MindSpore file to be written -> the moves that fill it.  Pure.

An entry is a parameter of the file: its elements come from a tensor that lies somewhere, cast on the way where the types
differ, or are given as they are (scalars, texts).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.moves import Move, Sink, in_source_order, move_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One parameter: ``shape`` and ``dtype`` as stored, ``source`` a tensor of as many elements or the payload itself.

    ``role`` (param, exp_avg, ...) labels its digest beside the name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorRef | bytes
    role: str = "param"

    @property
    def nbytes(self) -> int:
        """Bytes of payload in the file to be written."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def is_streamed(self) -> bool:
        """True when moves fill it, False when its bytes are at hand."""
        return not isinstance(self.source, bytes)


def number_entry(name: str, value: float, dtype: str) -> Entry:
    """A scalar: ``int64``, ``int32``, ``float32`` or ``float64``, without dimensions."""
    code = {"int64": "<q", "int32": "<i", "float32": "<f", "float64": "<d", "bool": "<?"}[dtype]
    return Entry(name=name, dtype=dtype, shape=(), source=struct.pack(code, value))


def text_entry(name: str, text: str) -> Entry:
    """A text; the empty one is a single NUL (mindspore 2.10.0, through numpy's ``<U``)."""
    return Entry(name=name, dtype="str", shape=(), source=(text or "\0").encode("utf-32-le"))


def slices(nbytes: int, limit: int | None) -> list[tuple[int, int]]:
    """(first byte, bytes) of each slice of a payload: one up to ``limit`` bytes, else chunks of the limit and the rest."""
    if limit is None or nbytes <= limit:
        return [(0, nbytes)]
    return [(start, min(limit, nbytes - start)) for start in range(0, nbytes, limit)]


def entry_moves(file: str, entries: Iterable[Entry], limit: int | None) -> tuple[Move, ...]:
    """Every move of ``file`` in the order of the sources.  Storages are the slices of the streamed entries, counted on."""
    found: list[Move] = []
    storage = 0
    for entry in entries:
        if isinstance(entry.source, TensorRef):
            width = DTYPE_BYTES[entry.dtype]
            for start, nbytes in slices(entry.nbytes, limit):
                sinks = (Sink(file=file, storage=storage, start=0, dtype=entry.dtype),)
                found.append(move_of(entry.name, entry.role, entry.source, start // width, nbytes // width, sinks))
                storage += 1
    return in_source_order(move for move in found if move.nbytes)
