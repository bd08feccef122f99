"""Text for people."""

from __future__ import annotations

import pytest

from ckpt2pt.errors import size
from ckpt2pt.io.text import render, short, spans, table


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3072.0 TiB")],
)
def test_sizes_are_human(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_columns_are_aligned_and_empty_ones_left_out() -> None:
    assert table(("name", "nothing", "n"), [("a", "", 1), ("long", "", 100)], right=frozenset({2})) == [
        "name    n",
        "a       1",
        "long  100",
    ]
    assert table(("name",), []) == []


def test_long_values_are_cut_and_stay_on_one_line() -> None:
    assert short("x" * 100) == "x" * 57 + "..."
    assert short("a\nb") == "'a\\nb'"


def test_a_document_is_facts_then_groups_and_tables() -> None:
    document = {
        "kind": "thing",
        "path": "here",
        "fullName": "x",
        "bytes": 2048,
        "rows": [{"name": "a", "bytes": 1024, "yes": True}, {"name": "b", "bytes": 1, "yes": False}],
        "group": {"one": 1, "inner": {"two": 2}},
        "words": ["a doubt"],
        "empty": [],
    }
    assert render(document).splitlines() == [
        "thing  here",
        "full name  x",
        "bytes      2.0 KiB",
        "",
        "rows",
        "  name    bytes  yes",
        "  a     1.0 KiB  yes",
        "  b         1 B  no",
        "",
        "group",
        "  one  1",
        "  inner",
        "    two  2",
        "",
        "words",
        "  a doubt",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"), [(set(), "none"), ({4}, "4"), ({0, 1, 2, 5}, "0-2,5"), ({1, 3, 5}, "1,3,5"), ({9, 8}, "8-9")]
)
def test_spans_are_short(numbers: set[int], text: str) -> None:
    assert spans(numbers) == text
