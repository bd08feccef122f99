"""Moves: stretches of files, cut to the byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.moves import cut


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_cutting_joined_extents_is_slicing_their_bytes(sizes: list[int], start: int, nbytes: int) -> None:
    data, extents = b"", []
    for number, size in enumerate(sizes):
        extents.append(Extent(str(number), 100, size))
        data += bytes([number]) * size
    found = cut(tuple(extents), start, nbytes)
    assert b"".join(bytes([int(e.path)]) * e.nbytes for e in found) == data[start : start + nbytes]
    assert all(e.nbytes and e.offset >= 100 and e.offset + e.nbytes <= 100 + sizes[int(e.path)] for e in found)
