"""A global tensor that lies in a stored one otherwise than its own axes run: regions of it, and the views that they become.  Pure.

    linear_fc1 (2, ffn, hidden) in a stored tensor (2 * ffn, hidden) whose rows are gate, up, gate, up, ...
    Region   gate: from (0, 0, 0) on (1, ffn, hidden), from the stored (0, 0) on; rows in steps of 2, columns in steps of 1

A reader of a format that fuses, interleaves or transposes parameters says nothing but regions; where the stored tensor is
sharded, each part of it is a view of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ckpt2pt.core.extents import Shape, Stored, View


class Region(NamedTuple):
    """A box of a global tensor; its first element is at ``start`` of the stored tensor.

    Axis ``k`` of it runs along axis ``axes[k]`` of the stored tensor, in steps of ``steps[k]``; along None it has one element.
    No two axes run along the same one.
    """

    origin: Shape
    shape: Shape
    start: Shape
    axes: tuple[int | None, ...]
    steps: Shape


def rows(shape: Shape, first: int = 0, *, at: int = 0, count: int | None = None) -> Region:
    """``count`` rows (all of them) of a tensor of ``shape`` from ``at`` on, as they are stored from row ``first`` on."""
    length = shape[0] - at if count is None else count
    rest = len(shape) - 1
    return Region(
        (at, *(0,) * rest), (length, *shape[1:]), (first, *(0,) * rest), tuple(range(rest + 1)), (1,) * (rest + 1)
    )


def view_of(region: Region, part: Stored) -> Stored | None:
    """What ``part``, a box of the stored tensor, holds of a region; None for nothing."""
    origin, shape, strides = list(region.origin), list(region.shape), [0] * len(region.shape)
    first = part.first
    runs = {axis: own for own, axis in enumerate(region.axes) if axis is not None}
    for axis, (low, length, stride, start) in enumerate(
        zip(part.origin, part.shape, part.strides, region.start, strict=True)
    ):
        own = runs.get(axis)
        step, count = (1, 1) if own is None else (region.steps[own], region.shape[own])
        skipped = max(0, -(-(low - start) // step))
        stop = min(count, -(-(low + length - start) // step))
        if skipped >= stop:
            return None
        first += (start + step * skipped - low) * stride
        if own is not None:
            origin[own] += skipped
            shape[own] = stop - skipped
            strides[own] = step * stride
    return View(tuple(origin), tuple(shape), tuple(strides), first, part.storage)


class Parts:
    """The parts of a stored tensor, to be looked up by the region that they hold."""

    def __init__(self, parts: Iterable[Stored]) -> None:
        self._all = list(parts)
        self._rows: dict[tuple[int, int], list[Stored]] = {}
        for part in self._all:
            self._rows.setdefault((part.origin[0], part.shape[0]) if part.shape else (0, 1), []).append(part)

    def views(self, regions: Sequence[Region]) -> Iterator[Stored]:
        """The views that hold ``regions``, one region after the other."""
        for region in regions:
            if not region.start:
                yield from (part._replace(origin=region.origin, shape=region.shape) for part in self._all)
                continue
            own = next((number for number, axis in enumerate(region.axes) if axis == 0), None)
            reach = 1 if own is None else (region.shape[own] - 1) * region.steps[own] + 1
            for (low, length), parts in self._rows.items():
                if low < region.start[0] + reach and region.start[0] < low + length:
                    yield from (view for part in parts if (view := view_of(region, part)))
