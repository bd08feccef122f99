"""Views and boxes against numpy: random shapes, cuts and strides; gaps and overlaps are found."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, View, intersection
from ckpt2pt.core.tensor import Key, Tensor, box_of, boxes, check_coverage, dense_strides, sharded
from ckpt2pt.errors import CoverageError

WEIGHT = Key("param", "w")
STORAGE: tuple[Extent, ...] = (Extent("file", 0, 1 << 20),)

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    origin = tuple(draw(st.integers(0, length - 1)) for length in shape)
    return origin, tuple(draw(st.integers(1, length - at)) for at, length in zip(origin, shape, strict=True))


def tensor_of(shape: tuple[int, ...], views: list[View[tuple[Extent, ...]]]) -> Tensor:
    return Tensor(WEIGHT, "float32", shape, shape, tuple(views))


def marked(
    shape: tuple[int, ...], box: tuple[tuple[int, ...], tuple[int, ...]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mask = np.zeros(shape, np.bool_)
    mask[tuple(slice(at, at + length) for at, length in zip(*box, strict=True))] = True
    return mask


@given(shapes)
def test_dense_strides_are_numpys(shape: tuple[int, ...]) -> None:
    assert dense_strides(shape) == tuple(step // 4 for step in np.empty(shape, np.float32).strides)


@given(shapes.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape))))
def test_an_intersection_is_what_both_boxes_hold(case: tuple[tuple[int, ...], ...]) -> None:
    shape, one, other = case
    both = marked(shape, one) & marked(shape, other)  # type: ignore[arg-type]
    found = intersection(one, other)  # type: ignore[arg-type]
    assert np.array_equal(both, marked(shape, found) if found else np.zeros(shape, np.bool_))


@given(shapes, st.data())
def test_boxes_are_a_range_of_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = np.arange(numel).reshape(shape)
    found = [
        numbers[tuple(slice(at, at + length) for at, length in zip(origin, part, strict=True))].reshape(-1)
        for origin, part in boxes(shape, start, stop)
    ]
    assert np.array_equal(np.concatenate([*found, np.empty(0, np.int64)]), np.arange(start, stop))


def test_a_range_of_whole_rows_is_one_box() -> None:
    assert list(boxes((4, 6), 6, 18)) == [((1, 0), (2, 6))]
    assert list(boxes((4, 6), 4, 20)) == [((0, 4), (1, 2)), ((1, 0), (2, 6)), ((3, 0), (1, 2))]


def test_a_scalar_has_one_box_without_axes() -> None:
    assert list(boxes((), 0, 1)) == [((), ())]
    assert list(boxes((), 0, 0)) == []


@given(
    shapes.filter(bool).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(0, len(shape) - 1), st.integers(1, 8), st.integers(0, 9))
    )
)
def test_shards_are_what_numpy_splits(case: tuple[tuple[int, ...], int, int, int]) -> None:
    local, axis, of, first = case
    shape = tuple(length * of if number == axis else length for number, length in enumerate(local))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    views = [sharded(shape, axis, rank, of, first, STORAGE) for rank in range(of)]
    check_coverage(tensor_of(shape, views), "here")
    for view, part in zip(views, np.split(numbers, of, axis), strict=True):
        assert (view.first, view.shape, view.strides) == (first, local, dense_strides(local))
        assert np.array_equal(numbers[marked(shape, box_of(view))], part.reshape(-1))


def test_what_is_not_cut_is_whole_on_every_rank() -> None:
    assert box_of(sharded((3, 2), None, 1, 4, 0, STORAGE)) == ((0, 0), (3, 2))


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[View[tuple[Extent, ...]]]:
    """A view for each cell that the ``cuts`` of each axis make."""
    cells: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length, inner in zip(shape, cuts, strict=True):
        edges = sorted({0, length, *(at for at in inner if at < length)})
        cells = [((*origin, low), (*part, high - low)) for origin, part in cells for low, high in pairwise(edges)]
    return [View(origin, part, dense_strides(part), 0, STORAGE) for origin, part in cells]


grids = st.lists(st.integers(1, 5), min_size=1, max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(tuple(shape)), st.tuples(*(st.lists(st.integers(1, 4), max_size=2) for _ in shape)).map(list)
    )
)


@given(grids, st.randoms(use_true_random=False))
def test_any_grid_of_views_in_any_order_covers(case: tuple[tuple[int, ...], list[list[int]]], random: object) -> None:
    shape, cuts = case
    views = grid(shape, cuts)
    random.shuffle(views)  # type: ignore[attr-defined]
    check_coverage(tensor_of(shape, views), "here")


@given(grids, st.data())
def test_one_view_that_is_moved_resized_doubled_or_missing_is_found(
    case: tuple[tuple[int, ...], list[list[int]]], data: st.DataObject
) -> None:
    shape, cuts = case
    views = grid(shape, cuts)
    place = data.draw(st.integers(0, len(views) - 1))
    change = data.draw(st.sampled_from(["missing", "double", "moved", "resized"]))
    before = views[place]
    if change == "missing":
        views.pop(place)
    elif change == "double":
        views.append(before)
    else:
        axis = data.draw(st.integers(0, len(shape) - 1))
        changed = list(before.origin if change == "moved" else before.shape)
        changed[axis] += data.draw(st.sampled_from([-1, 1]))
        end = tuple(changed)
        views[place] = before._replace(origin=end) if change == "moved" else before._replace(shape=end)
    held = sum(marked_within(shape, view) for view in views)
    exact = isinstance(held, np.ndarray) and bool((held == 1).all()) and all(inside(shape, view) for view in views)
    if exact:
        check_coverage(tensor_of(shape, views), "here")
        return
    with pytest.raises(CoverageError, match="parts hold") as caught:
        check_coverage(tensor_of(shape, views), "folder")
    assert (caught.value.where, caught.value.exit_code) == ("folder", 65)


def inside(shape: tuple[int, ...], view: View[tuple[Extent, ...]]) -> bool:
    return all(at >= 0 and at + n <= length for at, n, length in zip(view.origin, view.shape, shape, strict=True))


def marked_within(
    shape: tuple[int, ...], view: View[tuple[Extent, ...]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    found = np.zeros(shape, np.int64)
    found[tuple(slice(max(0, at), max(0, at + n)) for at, n in zip(view.origin, view.shape, strict=True))] = 1
    return found


def test_equal_counts_with_a_gap_and_an_overlap_are_reported_as_twice() -> None:
    views = [View((at,), (2,), (1,), 0, STORAGE) for at in (0, 1)]
    with pytest.raises(CoverageError, match="2 parts hold 4 of 4 elements, some of them twice"):
        check_coverage(tensor_of((4,), views), "here")


def test_a_key_says_what_it_is() -> None:
    assert str(WEIGHT) == "w"
    assert str(Key("exp_avg", "w")) == "exp_avg of w"
    assert str(Tensor(WEIGHT, "bfloat16", (2, 4, 3), (8, 3), ())) == "w bfloat16[8, 3]"
