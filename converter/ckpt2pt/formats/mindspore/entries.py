"""Entries of a MindSpore file to be written, and the slots that they are.  Pure.

An entry is a parameter of the file: its elements are a box of a tensor, cast on the way where the types differ, or are given as
they are (scalars, texts).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from operator import add
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Box
from ckpt2pt.core.slots import FileSlots, Slot
from ckpt2pt.core.tensor import Key, boxes


class TensorBox(NamedTuple):
    """A box of a tensor, in its natural axes."""

    key: Key
    box: Box


class Entry(NamedTuple):
    """One parameter: ``shape`` and ``dtype`` as stored, ``source`` as many elements of a tensor or the payload itself."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorBox | bytes

    @property
    def role(self) -> str:
        """That of its tensor (param, exp_avg, ...)."""
        return "param" if isinstance(self.source, bytes) else self.source.key.role

    @property
    def nbytes(self) -> int:
        """Bytes of payload in the file to be written."""
        if isinstance(self.source, bytes):
            return len(self.source)
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


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


def slots_of(file: str, entries: Iterable[Entry], limit: int | None) -> FileSlots:
    """What ``file`` holds of tensors.  Storages are the slices of the entries that are no bytes, counted on."""
    found: list[Slot] = []
    sizes: list[int] = []
    for entry in entries:
        if isinstance(entry.source, bytes):
            continue
        (key, box), width, nbytes = entry.source, DTYPE_BYTES[entry.dtype], entry.nbytes
        if limit is None or nbytes <= limit:
            found.append(Slot(key, entry.dtype, len(sizes), 0, box))
            sizes.append(nbytes)
            continue
        for start, size in slices(nbytes, limit):
            at = 0
            for inner, shape in boxes(box[1], start // width, (start + size) // width):
                found.append(Slot(key, entry.dtype, len(sizes), at, (tuple(map(add, box[0], inner)), shape)))
                at += math.prod(shape)
            sizes.append(size)
    return FileSlots(name=file, slots=tuple(found), storages=tuple(sizes))
