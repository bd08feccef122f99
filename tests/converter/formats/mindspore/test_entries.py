"""Entries of a MindSpore file and their slots: every element at its place, none across a slice."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import DTYPE_BYTES, Extent
from ckpt2pt.core.fill import moves_of
from ckpt2pt.core.tensor import Key, local_tensor
from ckpt2pt.formats.mindspore.entries import Entry, TensorBox, number_entry, slices, slots_of, text_entry


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
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([None, 32, 128]),
)
def test_slots_fill_every_slice_with_the_elements_of_its_place(
    shape: list[int], source: str, target: str, limit: int | None
) -> None:
    """``numpy`` is the judge: elements that are their own numbers, in C order."""
    key, origin = Key("param", "w"), (2, 1, 3)[: len(shape)]
    whole = tuple(start + length + 1 for start, length in zip(origin, shape, strict=True))
    numbers = np.arange(math.prod(whole)).reshape(whole)
    part = numbers[tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))]
    entry = Entry(name="w", dtype=target, shape=tuple(shape), source=TensorBox(key, (origin, tuple(shape))))
    file = slots_of("f", [entry], limit)
    assert file.storages == tuple(nbytes for _, nbytes in slices(entry.nbytes, limit))
    written = [np.full(nbytes // DTYPE_BYTES[target], -1) for nbytes in file.storages]
    extent = Extent("x", 0, numbers.size * DTYPE_BYTES[source])
    for move in moves_of({key: local_tensor(key, source, whole, (extent,))}, [file], "here"):
        [sink], width = move.sinks, DTYPE_BYTES[source]
        found = [e.offset // width + number for e in move.extents for number in range(e.nbytes // width)]
        for copy in move.copies:
            starts = (copy.source_start + run * copy.source_stride for run in range(copy.runs))
            found += [start + number for start in starts for number in range(copy.run)]
        written[sink.storage][sink.start : sink.start + len(found)] = found
    assert np.concatenate(written).tolist() == part.flatten().tolist()


def test_what_is_at_hand_has_no_slot() -> None:
    assert not slots_of("f", [number_entry("a", 1, "int64"), text_entry("t", "x")], None).slots
    assert number_entry("a", 1, "int64").source == b"\1" + bytes(7)
    assert text_entry("t", "").source == bytes(4)
