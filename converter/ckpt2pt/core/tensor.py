"""Global tensors, and the views of storages that hold them.  Pure: integers and names.

global tensor   (2, 16, 8): gate and up, rows, columns
View            tp rank 1 of 2 holds the box [0:2, 8:16, 0:8], in C order, from element 0 of its storage on
storage         the extents of a file
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple

from ckpt2pt.core.extents import Box, Extent, S, Shape, Stored, View, intersection
from ckpt2pt.errors import CoverageError

Role = Literal["param", "main_param", "exp_avg", "exp_avg_sq"]
"""A weight in the model's precision, its float32 main parameter, and Adam's two moments."""

ROLES: tuple[Role, ...] = ("param", "main_param", "exp_avg", "exp_avg_sq")


class Key(NamedTuple):
    """What a tensor is: its role, and the name of the parameter with global numbers of layers."""

    role: Role
    name: str

    def __str__(self) -> str:
        return self.name if self.role == "param" else f"{self.role} of {self.name}"


class Tensor(NamedTuple):
    """One global tensor.

    ``shape`` are its natural axes: a gated ``linear_fc1`` has (2, ffn, hidden), so that what tensor parallelism cuts is one
    axis; ``fused`` is the shape that users know, (2 * ffn, hidden), with the same elements in C order.  ``views`` hold
    each element once; ``replicas`` must hold the same bytes and are compared.
    """

    key: Key
    dtype: str
    shape: Shape
    fused: Shape
    views: tuple[Stored, ...]
    replicas: tuple[Stored, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.key} {self.dtype}{list(self.fused)}"


@lru_cache(1 << 10)
def dense_strides(shape: Shape) -> Shape:
    """Strides of C order, in elements."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides)) if shape else ()


def sharded(shape: Shape, axis: int | None, rank: int, of: int, first: int, storage: S) -> View[S]:
    """What rank ``rank`` of ``of`` holds of a tensor that is cut along ``axis`` (None: all of it), in C order."""
    local = tuple(length // of if number == axis else length for number, length in enumerate(shape))
    origin = tuple(rank * length if number == axis else 0 for number, length in enumerate(local))
    return View(origin, local, dense_strides(local), first, storage)


def local_tensor(key: Key, dtype: str, shape: Shape, storage: tuple[Extent, ...]) -> Tensor:
    """What a rank holds of a tensor, by itself: as if it were all of it."""
    return Tensor(key, dtype, shape, shape, (View((0,) * len(shape), shape, dense_strides(shape), 0, storage),))


def box_of(view: View[S]) -> Box:
    """The box that a view holds."""
    return view.origin, view.shape


def check_coverage(tensor: Tensor, where: str) -> None:
    """Raise :class:`CoverageError` unless the views hold each element of the tensor exactly once."""
    if is_grid([box_of(view) for view in tensor.views], tensor.shape):
        return
    whole = (0,) * len(tensor.shape), tensor.shape
    held = sum(view.numel for view in tensor.views)
    outside = any(intersection(box_of(view), whole) != box_of(view) for view in tensor.views)
    if held != tensor.numel or outside or _overlap(tensor.views):
        raise CoverageError(
            f"{tensor}: its {len(tensor.views)} parts hold {held} of {tensor.numel} elements"
            + (", some of them twice" if held == tensor.numel else ""),
            where=where,
            hint="check the parallel sizes, and that the checkpoint is complete",
        )


def is_grid(boxes: Sequence[Box], shape: Shape) -> bool:
    """Whether boxes fill a shape exactly, row by row: along each axis they are equal or follow each other.

    Takes no longer than sorting them, which comparing all pairs does.
    """
    if not shape:
        return len(boxes) == 1
    rows: dict[tuple[int, int], list[Box]] = {}
    for origin, part in boxes:
        rows.setdefault((origin[0], part[0]), []).append((origin[1:], part[1:]))
    end = 0
    for start, length in sorted(rows):
        if start != end:
            return False
        end += length
    return end == shape[0] and all(is_grid(inner, shape[1:]) for inner in rows.values())


def _overlap(views: Sequence[Stored]) -> bool:
    return any(intersection(box_of(one), box_of(other)) for one, other in combinations(views, 2))


def boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """The elements ``[start, stop)`` of a C-ordered tensor as boxes, in order and as few as there can be for its axes."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, offset = divmod(start, inner)
        rows = (stop - start) // inner
        if offset or not rows:
            end = min(stop - row * inner, inner)
            for origin, part in boxes(shape[1:], offset, end):
                yield (row, *origin), (1, *part)
            start = row * inner + end
        else:
            yield (row, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * inner
