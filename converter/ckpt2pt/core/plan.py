"""What goes where: a box of a tensor, as strided copies from the views that hold it.  Pure.

views, box  ->  Copy: ``runs`` runs of ``run`` elements each, from a storage into the box in C order
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ckpt2pt.core.extents import Box, Extent, Gather, Stored, View, intersection
from ckpt2pt.core.tensor import box_of, dense_strides


class Copy(NamedTuple):
    """``runs`` runs of ``run`` elements; starts and strides in elements of ``storage`` and of the box in C order."""

    storage: tuple[Extent, ...]
    source_start: int
    source_stride: int
    target_start: int
    target_stride: int
    run: int
    runs: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.run * self.runs

    def between(self, start: int, stop: int) -> Iterator[Copy]:
        """What of it goes into the elements ``[start, stop)``: at most a part of a run, whole runs, and a part of a run."""
        first = max(0, -(-(start - self.target_start - self.run + 1) // self.target_stride))
        last = min(self.runs, -(-(stop - self.target_start) // self.target_stride))
        while first < last:
            begin = self.target_start + first * self.target_stride
            low, high = max(start, begin), min(stop, begin + self.run)
            if high - low == self.run:  # whole runs, up to the last that ends inside
                whole = min(last, (stop - self.target_start - self.run) // self.target_stride + 1) - first
            else:
                whole = 1
            source = self.source_start + first * self.source_stride + low - begin
            yield self._replace(source_start=source, target_start=low, run=high - low, runs=whole)
            first += whole


def gather_box(views: Sequence[Stored], box: Box) -> Gather:
    """A box, wherever ``views`` hold its elements."""
    return Gather(tuple(view for view in views if intersection(box_of(view), box)), box)


def copies(gather: Gather) -> tuple[Copy, ...]:
    """Every copy into a box, in the order of the box, as few as the strides of both sides allow."""
    target = View(*gather.box, dense_strides(gather.box[1]), 0, None)
    found = [
        copy
        for view in gather.views
        if (shared := intersection(box_of(view), gather.box))
        for copy in _copies(shared, view, target)
    ]
    return tuple(sorted(found, key=lambda copy: copy.target_start))


def _copies(box: Box, source: Stored, target: View[None]) -> Iterator[Copy]:
    starts = [_address(box, source), _address(box, target)]
    axes = [axis for axis in zip(box[1], source.strides, target.strides, strict=True) if axis[0] > 1]
    # The target's order, as it is written forwards; an axis joins the one outside it where both sides run on.
    axes.sort(key=lambda axis: -axis[2])
    joined: list[tuple[int, int, int]] = []
    for length, read, written in axes:
        if joined and joined[-1][1:] == (length * read, length * written):
            outer = joined.pop()[0]
            joined.append((outer * length, read, written))
        else:
            joined.append((length, read, written))
    run = joined.pop()[0] if joined and joined[-1][1:] == (1, 1) else 1
    runs, source_stride, target_stride = joined.pop() if joined else (1, run, run)
    for position in product(*(range(length) for length, _, _ in joined)):
        start, put = (
            first + sum(at * axis[side] for at, axis in zip(position, joined, strict=True))
            for side, first in enumerate(starts, 1)
        )
        yield Copy(source.storage, start, source_stride, put, target_stride, run, runs)


def _address(box: Box, view: Stored | View[None]) -> int:
    """The element of the view's storage that holds the first element of a box inside it."""
    return view.first + sum(
        (at - origin) * stride for at, origin, stride in zip(box[0], view.origin, view.strides, strict=True)
    )


def covered(found: Sequence[Copy]) -> int:
    """Number of elements that copies fill."""
    return sum(copy.numel for copy in found)
