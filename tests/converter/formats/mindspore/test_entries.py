"""Entries of a MindSpore file and their moves: every element once, no move across a slice, none too large."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.formats.mindspore.entries import Entry, entry_moves, number_entry, slices, text_entry


def entry(numel: int, source: str, target: str, cuts: tuple[int, ...] = ()) -> Entry:
    marks = [0, *sorted(cuts), numel * DTYPE_BYTES[source]]
    extents = tuple(Extent("x", a, b - a) for a, b in pairwise(marks) if b > a)
    return Entry(name="w", dtype=target, shape=(numel,), source=TensorRef("w", source, (numel,), extents))


@pytest.mark.parametrize(
    ("nbytes", "limit", "wanted"),
    [
        (0, 8, [(0, 0)]),
        (8, 8, [(0, 8)]),
        (9, 8, [(0, 8), (8, 1)]),
        (17, 8, [(0, 8), (8, 8), (16, 1)]),
        (17, None, [(0, 17)]),
    ],
)
def test_a_payload_is_cut_only_when_it_is_larger_than_the_limit(
    nbytes: int, limit: int | None, wanted: list[tuple[int, int]]
) -> None:
    assert slices(nbytes, limit) == wanted


@given(
    st.integers(1, 400),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([None, 32, 128]),
)
def test_moves_cover_every_element_once_and_stay_inside_a_slice(
    numel: int, source: str, target: str, limit: int | None
) -> None:
    given_entry = entry(numel, source, target, (numel // 3, numel // 2))
    moves = entry_moves("f", [given_entry], limit)
    sizes = [nbytes for _, nbytes in slices(given_entry.nbytes, limit)]
    read: list[tuple[int, int]] = []
    written: list[tuple[int, int, int]] = []
    for move in moves:
        (sink,) = move.sinks
        count = move.nbytes // DTYPE_BYTES[source]
        read.append((move.first, count))
        written.append((sink.storage, sink.start, count))
        assert (sink.start + count) * DTYPE_BYTES[target] <= sizes[sink.storage]
        assert move.extents[0].offset == move.first * DTYPE_BYTES[source]
    assert [i for first, count in sorted(read) for i in range(first, first + count)] == list(range(numel))
    assert sum(count for _, _, count in written) * DTYPE_BYTES[target] == sum(sizes)


def test_what_is_at_hand_needs_no_move() -> None:
    assert not entry_moves("f", [number_entry("a", 1, "int64"), text_entry("t", "x")], None)
    assert number_entry("a", 1, "int64").source == b"\1" + bytes(7)
    assert text_entry("t", "").source == bytes(4)
