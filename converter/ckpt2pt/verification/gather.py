"""Elements of tensors, read block by block from wherever they lie.

    elements [start, stop) in C order -> boxes -> of each view the stretch of storage that holds its share -> block

The planner of a conversion goes from boxes to addresses by arithmetic of its own; here numpy's strides do it, so that a
mistake in one of the two does not hide in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ckpt2pt.core.extents import DTYPE_BYTES, Box, Extent, Shape, Stored, View, intersection
from ckpt2pt.core.progress import Advance, no_progress
from ckpt2pt.core.tensor import Tensor, box_of, boxes, dense_strides
from ckpt2pt.io.checksums import Piece, crc32
from ckpt2pt.io.files import OpenFiles, read_at

BLOCK_BYTES = 512 << 10
_MAX_STRETCH_BYTES = 8 << 20

Bytes: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[np.generic]


def width(dtype: str) -> int:
    """Bytes of one element; a text counts in its characters, and a type nobody knows in bytes."""
    return DTYPE_BYTES.get(dtype) or {"complex128": 16, "str": 4}.get(dtype, 1)


def spans(numel: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut ``numel`` elements into blocks of at most :data:`BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // itemsize)
    for start in range(0, numel, step):
        yield start, min(numel, start + step)


class Files(OpenFiles):
    """Files open for reading, a few at a time; closed together.

    ``pieces`` tells what was read of the files that ``summed`` names: first byte, bytes, CRC-32.  ``nbytes`` counts what was
    read of all, and ``advance`` is called with it.
    """

    def __init__(self, summed: Iterable[Path] = (), advance: Advance = no_progress) -> None:
        super().__init__()
        self._advance = advance
        self.nbytes = 0
        self.pieces: dict[str, list[Piece]] = {str(path): [] for path in summed}

    def read(self, path: str, offset: int, out: memoryview) -> None:
        """Fill ``out`` from byte ``offset`` on."""
        read_at(self.get(path)[0], out, offset, path)
        self._advance(len(out))
        self.nbytes += len(out)
        pieces = self.pieces.get(path)
        if pieces is not None:
            first, nbytes, crc = pieces[-1] if pieces else (0, 0, 0)
            if pieces and first + nbytes == offset:
                pieces[-1] = first, nbytes + len(out), crc32(out, crc)
            else:
                pieces.append((offset, len(out), crc32(out, 0)))


class Elements(Protocol):
    """The elements of a tensor in C order, whatever holds them."""

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """The bytes of elements ``[start, stop)``; the caller may keep them."""
        ...


@dataclass(frozen=True, slots=True)
class Gathered:
    """The elements of a box of a tensor in C order, read from ``views``: the tensor's own, or one replica.

    What no view holds is zero.
    """

    dtype: str
    views: tuple[Stored, ...]
    box: Box

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """The bytes of elements ``[start, stop)``."""
        size = width(self.dtype)
        if len(self.views) == 1 and _is_dense(self.views[0], self.box):
            first = self.views[0].first
            return _read_stored(files, self.views[0].storage, (first + start) * size, (stop - start) * size)
        out: Array = np.zeros(stop - start, f"u{size}" if size <= 8 else f"V{size}")
        done = 0
        for inner, shape in boxes(self.box[1], start, stop):
            numel = math.prod(shape)
            origin = tuple(map(sum, zip(self.box[0], inner, strict=True)))
            self.read(files, (origin, shape), out[done : done + numel].reshape(shape))
            done += numel
        return out.view(np.uint8)

    def read(self, files: Files, box: Box, out: Array) -> None:
        """Fill ``out``, of the box's shape, with the elements of a box."""
        for view in self.views:
            shared = intersection(box_of(view), box)
            if shared is None:
                continue
            low, shape = shared
            place = tuple(slice(a - o, a - o + n) for a, o, n in zip(low, box[0], shape, strict=True))
            self._read(files, view, shared, out[place] if place else out)

    def _read(self, files: Files, view: Stored, box: Box, out: Array) -> None:
        """Read a box of one view: the stretch from its first to its last element, in halves where that is long."""
        size = out.itemsize
        extent = sum((length - 1) * stride for length, stride in zip(box[1], view.strides, strict=True)) + 1
        if extent * size > _MAX_STRETCH_BYTES and out.size > 1:
            axis = max(range(out.ndim), key=lambda number: (box[1][number] > 1, view.strides[number]))
            middle = box[1][axis] // 2
            for start, length in ((0, middle), (middle, box[1][axis] - middle)):
                part = tuple(
                    (o + start, length) if number == axis else (o, n)
                    for number, (o, n) in enumerate(zip(*box, strict=True))
                )
                place = (*(slice(None),) * axis, slice(start, start + length))
                self._read(files, view, (tuple(o for o, _ in part), tuple(n for _, n in part)), out[place])
            return
        first = view.first + sum((a - o) * s for a, o, s in zip(box[0], view.origin, view.strides, strict=True))
        stretch = _read_stored(files, view.storage, first * size, extent * size).view(out.dtype)
        strides = tuple(stride * size for stride in view.strides)
        out[...] = as_strided(stretch, box[1], strides, writeable=False)


def _is_dense(view: Stored, box: Box) -> bool:
    """Whether a view holds the box as it is, in C order: then there is nothing to gather."""
    dense = dense_strides(view.shape)
    return box_of(view) == box and (
        view.strides == dense
        or all(length == 1 or one == other for length, one, other in zip(view.shape, view.strides, dense, strict=True))
    )


def _read_stored(files: Files, storage: Sequence[Extent], skip: int, nbytes: int) -> Bytes:
    """``nbytes`` bytes of joined extents behind the first ``skip``; an extent may end inside an element."""
    out = np.empty(nbytes, np.uint8)
    view = out.data
    for extent in storage:
        size = min(extent.nbytes - skip, len(view))
        if size > 0:
            files.read(extent.path, extent.offset + skip, view[:size])
            view = view[size:]
        skip = max(0, skip - extent.nbytes)
        if not view:
            break
    return out


def stored(dtype: str, shape: Shape, extents: tuple[Extent, ...]) -> Gathered:
    """A tensor in C order in joined extents."""
    return strided(dtype, View((0,) * len(shape), shape, dense_strides(shape), 0, extents))


def strided(dtype: str, view: Stored) -> Gathered:
    """All that one view holds."""
    return Gathered(dtype, (view,), box_of(view))


def gathered(tensor: Tensor) -> Gathered:
    """All elements of a tensor, from its own views."""
    return Gathered(tensor.dtype, tensor.views, ((0,) * len(tensor.shape), tensor.shape))


def file_of(tensor: Tensor, element: int) -> str:
    """The path of the file that holds an element, counted in C order."""
    [box] = boxes(tensor.shape, element, element + 1)
    view = next(view for view in tensor.views if intersection(box_of(view), box))
    start = view.first + sum((a - o) * s for a, o, s in zip(box[0], view.origin, view.strides, strict=True))
    start *= width(tensor.dtype)
    for extent in view.storage:
        if start < extent.nbytes:
            return extent.path
        start -= extent.nbytes
    return ""
