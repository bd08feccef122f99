"""The elements of a global tensor, block by block, from wherever its views lie.

    elements [start, stop) in C order -> boxes -> of each view the stretch of storage that holds its share -> block

The planner of a conversion goes from boxes to addresses by arithmetic of its own; here numpy's strides do it, so that a
mistake in one of the two does not hide in the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ckpt2pt.core.tensor import Tensor, box_of, boxes
from ckpt2pt.tensors import Box, Stored, intersection
from ckpt2pt.verify.leaves import Bytes, Files, width
from ckpt2pt.verify.leaves import Stored as StoredElements

_MAX_STRETCH_BYTES = 8 << 20

Elements = npt.NDArray[np.unsignedinteger]


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
        out: Elements = np.zeros(stop - start, f"u{width(self.dtype)}")
        done = 0
        for inner, shape in boxes(self.box[1], start, stop):
            numel = math.prod(shape)
            origin = tuple(map(sum, zip(self.box[0], inner, strict=True)))
            self.read(files, (origin, shape), out[done : done + numel].reshape(shape))
            done += numel
        return out.view(np.uint8)

    def read(self, files: Files, box: Box, out: Elements) -> None:
        """Fill ``out``, of the box's shape, with the elements of a box."""
        for view in self.views:
            shared = intersection(box_of(view), box)
            if shared is None:
                continue
            low, shape = shared
            place = tuple(slice(a - o, a - o + n) for a, o, n in zip(low, box[0], shape, strict=True))
            self._read(files, view, shared, out[place] if place else out)

    def _read(self, files: Files, view: Stored, box: Box, out: Elements) -> None:
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
        stretch = StoredElements(size, view.storage).block(files, first, first + extent).view(out.dtype)
        strides = tuple(stride * size for stride in view.strides)
        out[...] = as_strided(stretch, box[1], strides, writeable=False)


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
