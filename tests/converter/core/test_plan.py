"""Strided copies, with numpy as the judge: any views in any strides, any box, and any limits of blocks."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, Gather, Stored, View
from ckpt2pt.core.plan import Copy, copies, covered
from ckpt2pt.core.tensor import dense_strides, sharded

Array = npt.NDArray[Any]
FEW = settings(max_examples=150, deadline=None)


def storage(number: int) -> tuple[Extent, ...]:
    return (Extent(str(number), 0, 1 << 30),)


def apply(found: tuple[Copy, ...], storages: list[Array], numel: int) -> Array:
    """Carry copies out, element by element; nothing is written twice."""
    out = np.full(numel, -1)
    for copy in found:
        source = storages[int(copy.storage[0].path)]
        for number in range(copy.runs):
            read = copy.source_start + number * copy.source_stride
            put = copy.target_start + number * copy.target_stride
            assert put >= 0
            assert put + copy.run <= numel
            assert (out[put : put + copy.run] == -1).all()
            out[put : put + copy.run] = source[read : read + copy.run]
    return out


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Array, tuple[Stored, ...], list[Array]]:
    """A tensor of one to four axes, cut into views along each axis; every view lies in a storage with gaps, in any order of axes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    whole = np.arange(prod(shape)).reshape(shape)
    marks = [sorted({0, length, *draw(st.sets(st.integers(0, length), max_size=2))}) for length in shape]
    views: list[Stored] = []
    storages: list[Array] = []
    for cell in np.ndindex(*(len(mark) - 1 for mark in marks)):
        spans = [(marks[axis][at], marks[axis][at + 1]) for axis, at in enumerate(cell)]
        part = tuple(stop - start for start, stop in spans)
        if draw(st.integers(0, 9)) == 0:
            continue  # nobody holds it: padding
        order = draw(st.permutations(range(len(shape))))
        gaps = [draw(st.integers(0, 2)) for _ in shape]
        strides, reach = [0] * len(shape), 1
        for axis in order:
            strides[axis] = reach
            reach = reach * (part[axis] + gaps[axis])
        first = draw(st.integers(0, 5))
        memory = np.full(first + reach + 1, -7)
        inner = whole[tuple(slice(*span) for span in spans)]
        for place in np.ndindex(*part):
            memory[first + sum(a * s for a, s in zip(place, strides, strict=True))] = inner[place]
        origin = tuple(start for start, _ in spans)
        views.append(View(origin, part, tuple(strides), first, storage(len(storages))))
        storages.append(memory)
    return whole, tuple(views), storages


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A box that may reach beyond the tensor, into padding."""
    origin = tuple(draw(st.integers(0, length)) for length in shape)
    return origin, tuple(draw(st.integers(1, 4)) for _ in shape)


def expected(whole: Array, views: tuple[Stored, ...], box: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    held = np.full([max(n, o + s) for n, o, s in zip(whole.shape, *box, strict=True)], -1)
    for view in views:
        place = tuple(slice(o, o + n) for o, n in zip(view.origin, view.shape, strict=True))
        held[place] = whole[place]
    return held[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel()


@FEW
@given(st.data())
def test_copies_fill_any_box_from_views_in_any_strides(data: st.DataObject) -> None:
    whole, views, storages = data.draw(tensors())
    box = data.draw(boxes(whole.shape))
    gather = Gather(views, box)
    found = copies(gather)
    wanted = expected(whole, views, box)
    assert apply(found, storages, wanted.size).tolist() == wanted.tolist()
    assert covered(found) == gather.numel == int((wanted != -1).sum())
    assert [copy.target_start for copy in found] == sorted(copy.target_start for copy in found)


@FEW
@given(st.data())
def test_parts_between_any_limits_make_up_the_whole(data: st.DataObject) -> None:
    whole, views, storages = data.draw(tensors())
    box = data.draw(boxes(whole.shape))
    found, numel = copies(Gather(views, box)), prod(box[1])
    limits = sorted({0, numel, *data.draw(st.sets(st.integers(0, numel), max_size=5))})
    parts: list[Copy] = []
    for start, stop in pairwise(limits):
        inside = [piece for copy in found for piece in copy.between(start, stop)]
        assert all(start <= piece.target_start for piece in inside)
        assert all(p.target_start + (p.runs - 1) * p.target_stride + p.run <= stop for p in inside)
        assert all(len(list(copy.between(start, stop))) <= 3 for copy in found)
        parts += inside
    assert apply(tuple(parts), storages, numel).tolist() == expected(whole, views, box).tolist()


@pytest.mark.parametrize(("of", "axis"), [(2, 0), (4, 0), (2, 1), (4, 1), (8, 1)])
def test_a_plain_cut_takes_one_copy_for_each_view(of: int, axis: int) -> None:
    """As few copies as there can be: what a matrix of a billion elements must not do is one for each row."""
    shape = (64, 32)
    views = tuple(sharded(shape, axis, rank, of, 0, storage(rank)) for rank in range(of))
    assert len(copies(Gather(views, ((0, 0), shape)))) == of
    whole = (View((0, 0), shape, dense_strides(shape), 0, storage(0)),)
    for rank in range(of):
        part = sharded(shape, axis, rank, of, 0, None)
        (copy,) = copies(Gather(whole, (part.origin, part.shape)))
        assert copy.numel == prod(part.shape)
        assert copy.runs == (1 if axis == 0 else 64)


def test_a_gated_layer_takes_two_runs_for_each_view() -> None:
    shape = (2, 16, 8)
    views = tuple(sharded(shape, 1, rank, 2, 0, storage(rank)) for rank in range(2))
    found = copies(Gather(views, ((0, 0, 0), shape)))
    assert [(copy.run, copy.runs) for copy in found] == [(64, 2), (64, 2)]


def test_a_scalar_is_one_run() -> None:
    (copy,) = copies(Gather((View((), (), (), 3, storage(0)),), ((), ())))
    assert (copy.source_start, copy.target_start, copy.run, copy.runs) == (3, 0, 1, 1)


def test_what_nobody_holds_takes_no_copy() -> None:
    views = (View((0, 0), (4, 4), (4, 1), 0, storage(0)),)
    assert copies(Gather(views, ((4, 0), (2, 4)))) == ()
