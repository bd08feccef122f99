"""Checksums that are joined instead of computed again."""

from __future__ import annotations

import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.io.checksums import crc32, crc32_of_zeros, join


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_sum_continues_as_zlib_continues_it(first: bytes, second: bytes) -> None:
    assert crc32(second, crc32(first, 0)) == zlib.crc32(first + second)


@given(st.integers(0, 5000))
def test_zeros_need_not_be_there_to_be_summed(nbytes: int) -> None:
    assert crc32_of_zeros(nbytes) == zlib.crc32(bytes(nbytes))


def test_a_terabyte_of_zeros_takes_no_time() -> None:
    half = crc32_of_zeros(1 << 39)
    assert crc32_of_zeros(1 << 40) == join([(0, 1 << 39, half), (1 << 39, 1 << 39, half)], 1 << 40)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.binary(min_size=1, max_size=30)), max_size=8),
    st.integers(0, 9),
    st.randoms(),
)
def test_pieces_join_in_any_order_and_gaps_are_zeros(
    parts: list[tuple[int, bytes]], tail: int, dice: random.Random
) -> None:
    whole = bytearray()
    pieces: list[tuple[int, int, int]] = []
    for gap, data in parts:
        whole += bytes(gap)
        pieces.append((len(whole), len(data), crc32(data, 0)))
        whole += data
    whole += bytes(tail)
    dice.shuffle(pieces)
    assert join(pieces, len(whole)) == zlib.crc32(whole)
