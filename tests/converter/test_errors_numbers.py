"""Numbers as people read them."""

from __future__ import annotations

import pytest

from ckpt2pt.errors import counted, grouped, size


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB"),
    ],
)  # fmt: skip
def test_sizes_are_in_units_of_1024(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown


def test_counts_have_their_noun_and_separators() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 12345)] == ["0 ranks", "1 rank", "2 ranks", "12,345 ranks"]


def test_a_sentence_keeps_what_is_no_count() -> None:
    assert grouped("12582912 elements of iter_0000500, v0.12345, 1e-08, 4096") == (
        "12,582,912 elements of iter_0000500, v0.12345, 1e-08, 4096"
    )
